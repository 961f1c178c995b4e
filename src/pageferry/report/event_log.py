"""Event logs: all events of a command as JSON lines in a file (`--log FILE`).

::

    {"at-ms": 0.0, "type": "log", "schema": 1, "verb": "migrate", ...}        command, host and time
    {"at-ms": 12.4, "type": "setup", ...}                                     events
    {"at-ms": 612.9, "type": "migration", "status": "completed", ...}         result, if any
    {"at-ms": 613.0, "type": "end", "exit-code": 0, ...}                      exit code and error

`at-ms` is the time since the first line in milliseconds, by the monotonic clock. Each line is written by write(2) at
once, so that the log of a killed command contains all of its events. The file is synced at the end. A log without an
`end` line belongs to a command that was killed or is still running. A reader ignores an incomplete last line.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from pageferry.errors import UsageError
from pageferry.events import SCHEMA, Event
from pageferry.host import files
from pageferry.printable import printable_json
from pageferry.report.events import LogEnd, LogHeader

log = getLogger(__name__)

Kind = TypeVar("Kind", bound=Event)

MAX_LENGTH = 1 << 30
"""Maximum size of a log, bytes."""
OF_THE_PARSER = ("verb", "version", "completion", "takes_command", "works_on")
"""Attributes of the argparse namespace that are not arguments of the verb."""
HIDDEN = ("pass", "secret", "token", "psk", "credential")
"""Words that mark secrets: the value of an argument whose name contains one of them is not recorded."""


def header(verb: str, arguments: Mapping[str, Any]) -> LogHeader:
    """Return the header of a command that starts now."""
    from importlib.metadata import version

    system = os.uname()
    return LogHeader(
        schema=SCHEMA,
        verb=verb,
        arguments={
            name: _shown(name, value)
            for name, value in arguments.items()
            if name not in OF_THE_PARSER and not callable(value)
        },
        pageferry=version("pageferry"),
        kernel=system.release,
        host=system.nodename,
        pid=os.getpid(),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _shown(name: str, value: Any) -> Any:
    if value is not None and any(word in name.lower() for word in HIDDEN):
        return "(hidden)"
    if name in ("command", "words") and value:
        # The command line of a guest, and a command of its monitor, can contain passwords in many places. Only the
        # program and the number of arguments are recorded.
        return [value[0], f"({len(value) - 1} arguments)"]
    return value if isinstance(value, (str, int, float, list, type(None))) else str(value)


class EventLog:
    """Writer of an event log. After a write error, it logs a warning and writes nothing more; the command continues."""

    def __init__(self, path: Path | str, first: LogHeader, clock: Callable[[], float] = time.monotonic) -> None:
        """Create or truncate the file. Raises UsageError if it cannot be opened."""
        try:
            self._file: int | None = files.create_log(Path(path))
        except OSError as error:
            raise UsageError(f"cannot open --log {path}: {error.strerror}") from error
        self._path = path
        self._clock = clock
        self._began = clock()
        self.event(first)

    def event(self, event: Event) -> None:
        """Append an event or a result as one line."""
        if self._file is None:
            return
        at = round((self._clock() - self._began) * 1e3, 3)
        fields: dict[str, Any] = msgspec.to_builtins(event)
        try:
            _write(self._file, printable_json(msgspec.json.encode({"at-ms": at, **fields})) + b"\n")
        except OSError as error:
            log.warning("%s: cannot write the event log: %s; later events are lost", self._path, error.strerror)
            self._close()

    def end(self, exit_code: int, error: BaseException | None = None) -> None:
        """Write the end line, and sync the file."""
        name = type(error).__name__ if error is not None else None
        self.event(LogEnd(exit_code=exit_code, error=name, message=str(error) if error is not None else None))
        self._close()

    def _close(self) -> None:
        if self._file is None:
            return
        try:
            os.fsync(self._file)
        except OSError:
            pass  # write errors have been reported, and the command succeeds without its log
        finally:
            os.close(self._file)
            self._file = None


def _write(file: int, line: bytes) -> None:
    while line:
        line = line[os.write(file, line) :]


@dataclass(frozen=True, slots=True)
class Line:
    """Event of a log."""

    at: float
    """Time of the event, milliseconds since the first line."""
    tag: str
    """Type of the event (`type` in the file)."""
    fields: dict[str, Any]
    """All other fields, by their names in JSON."""

    def to(self, kind: type[Kind]) -> Kind:
        """Return the event as a record of type `kind`. Raises msgspec.ValidationError if its fields do not match."""
        return msgspec.convert({**self.fields, "type": kind.__struct_config__.tag}, kind)


@dataclass(frozen=True, slots=True)
class Log:
    """Contents of an event log."""

    path: Path
    header: LogHeader
    lines: list[Line]
    """Events and results, in order, without the header and the end line."""
    end: LogEnd | None
    """Contents of the end line; None if the command was killed or is still running."""
    ended_at: float | None
    """Time of the end line, milliseconds since the first line; None without an end line."""
    cut: bool
    """Whether the last line is incomplete."""

    def of(self, kind: type[Kind]) -> list[tuple[float, Kind]]:
        """Return the events of type `kind` with their times, milliseconds since the first line.

        Events that do not match the record are omitted, because another version of pageferry has written them.
        """
        found = []
        for line in self.lines:
            if line.tag == kind.__struct_config__.tag:
                with contextlib.suppress(msgspec.ValidationError):
                    found.append((line.at, line.to(kind)))
        return found

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a log. Raises UsageError if the file is not an event log, or is damaged before its last line."""
        try:
            rows = files.read_regular(path, MAX_LENGTH).split(b"\n")
        except OSError as error:
            raise UsageError(f"cannot read the event log {path}: {error.strerror}") from error
        # Text after the last line feed is an incomplete line: the command was killed or is still running.
        cut = bool(rows.pop())
        if not rows or not rows[0].startswith(b'{"at-ms":'):
            raise UsageError(
                f"cannot read {path}: it is not an event log; use a file that a verb has written with --log FILE"
            )
        lines = [_line(path, number, row) for number, row in enumerate(rows, 1)]
        if lines[0].tag != "log":
            raise UsageError(
                f"cannot read {path}: its first line has the type {lines[0].tag!r}, not 'log'; use the whole event log"
            )
        if (schema := lines[0].fields.get("schema")) != SCHEMA:
            raise UsageError(
                f"cannot read {path}: unsupported schema {schema}, this pageferry supports {SCHEMA}; use the "
                f"version that has written it"
            )
        try:
            last = lines.pop() if lines[-1].tag == "end" else None
            end, ended_at = (last.to(LogEnd), last.at) if last is not None else (None, None)
            return cls(path, lines[0].to(LogHeader), lines[1:], end, ended_at, cut)
        except msgspec.ValidationError as wrong:
            raise UsageError(f"cannot read {path}: its first or last line is invalid: {wrong}") from wrong


def _line(path: Path, number: int, row: bytes) -> Line:
    try:
        fields = msgspec.json.decode(row, type=dict[str, Any])
        return Line(float(fields.pop("at-ms")), str(fields.pop("type")), fields)
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as wrong:
        raise UsageError(f"cannot read {path}: line {number} is not an event: {wrong}") from wrong
