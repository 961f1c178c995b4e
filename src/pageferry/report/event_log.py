"""Event logs: everything that a command told, as JSON lines in a file (`--log FILE`).

::

    {"at-ms": 0.0, "type": "log", "schema": 1, "verb": "migrate", ...}        what was run, where and when
    {"at-ms": 12.4, "type": "setup", ...}                                     events, as docs/events.md describes them
    {"at-ms": 612.9, "type": "migration", "status": "completed", ...}         the result, if there is one
    {"at-ms": 613.0, "type": "end", "exit-code": 0, ...}                      how the command ended

`at-ms` counts from the first line, by a clock that is never set. Lines are handed to the kernel one by one, so that a
command that is killed leaves all it has told, and they are synced at the end. A log without its last line is one of a
command that was killed or still runs; a line that was cut short is passed over.
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

log = getLogger(__name__)

Kind = TypeVar("Kind", bound=Event)

MAX_LENGTH = 1 << 30
"""Bytes of a log that is read."""
OF_THE_PARSER = ("verb", "version", "completion", "takes_command", "works_on")
"""What a namespace of arguments holds besides them."""
HIDDEN = ("pass", "secret", "token", "psk", "credential")
"""An argument with such a name is not written down."""


class LogHeader(Event, frozen=True, kw_only=True, tag="log"):
    """The first line: what was run."""

    schema: int
    """Version of everything that follows."""
    verb: str
    arguments: dict[str, Any]
    """By name, with their defaults. Secrets are left out, and of another program's command line all but its name."""
    pageferry: str
    """Version."""
    kernel: str
    """Release of the host's."""
    host: str
    pid: int
    started: str
    """UTC, ISO 8601."""


class LogEnd(Event, frozen=True, kw_only=True, tag="end"):
    """The last line: how the command ended."""

    exit_code: int
    error: str | None = None
    """Name of the error, one of docs/exit-codes.md or of Python."""
    message: str | None = None


def header(verb: str, arguments: Mapping[str, Any]) -> LogHeader:
    """The header of a command that begins now."""
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
    if name == "command" and value:
        # The command line of a guest may hold passwords in many places.
        return [value[0], f"({len(value) - 1} arguments)"]
    return value if isinstance(value, (str, int, float, list, type(None))) else str(value)


class EventLog:
    """Writes an event log. What cannot be written is said once and then left: no command fails for its log."""

    def __init__(self, path: Path | str, first: LogHeader, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin the file anew. Raises UsageError where it cannot be opened."""
        try:
            self._file: int | None = files.create_log(Path(path))
        except OSError as error:
            raise UsageError(f"--log {path}: {error.strerror}") from error
        self._path = path
        self._clock = clock
        self._began = clock()
        self.event(first)

    def event(self, event: Event) -> None:
        """Write an event or a result."""
        if self._file is None:
            return
        at = round((self._clock() - self._began) * 1e3, 3)
        fields: dict[str, Any] = msgspec.to_builtins(event)
        try:
            _write(self._file, printable_json(msgspec.json.encode({"at-ms": at, **fields})) + b"\n")
        except OSError as error:
            log.warning("%s cannot be written any more: %s", self._path, error.strerror)
            self._close()

    def end(self, exit_code: int, error: BaseException | None = None) -> None:
        """Write how the command ended, and sync the file."""
        name = type(error).__name__ if error is not None else None
        self.event(LogEnd(exit_code=exit_code, error=name, message=str(error) if error is not None else None))
        self._close()

    def _close(self) -> None:
        if self._file is None:
            return
        try:
            os.fsync(self._file)
        except OSError:
            pass  # reported already
        finally:
            os.close(self._file)
            self._file = None


def _write(file: int, line: bytes) -> None:
    while line:
        line = line[os.write(file, line) :]


@dataclass(frozen=True, slots=True)
class Line:
    """An event of a log."""

    at: float
    """Milliseconds after the beginning."""
    tag: str
    """What it is: `type` in the file."""
    fields: dict[str, Any]
    """As written, with the names of docs/events.md."""

    def to(self, kind: type[Kind]) -> Kind:
        """The event as a record."""
        return msgspec.convert({**self.fields, "type": kind.__struct_config__.tag}, kind)


@dataclass(frozen=True, slots=True)
class Log:
    """An event log that has been read."""

    path: Path
    header: LogHeader
    lines: list[Line]
    """What was told, results too."""
    end: LogEnd | None
    """None: the command was killed, or still runs."""
    ended_at: float | None
    """Milliseconds after the beginning."""
    cut: bool
    """Whether the last line was cut short."""

    def of(self, kind: type[Kind], *tags: str) -> list[tuple[float, Kind]]:
        """Events of a kind, and when; `tags`: of these names instead of its own. Those of another shape are left out:
        they were written by another pageferry."""
        wanted = tags or (str(kind.__struct_config__.tag),)
        found = []
        for line in self.lines:
            if line.tag in wanted:
                with contextlib.suppress(msgspec.ValidationError):
                    found.append((line.at, line.to(kind)))
        return found

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a log. Raises UsageError for what is none, or is damaged elsewhere than at its end."""
        try:
            rows = files.read_regular(path, MAX_LENGTH).split(b"\n")
        except OSError as error:
            raise UsageError(f"{path} cannot be read as an event log: {error.strerror}") from error
        # What stands after the last line feed was cut short; mostly it is nothing.
        cut = bool(rows.pop())
        if not rows or not rows[0].startswith(b'{"at-ms":'):
            raise UsageError(f"{path} is no event log: any verb writes one with --log FILE")
        lines = [_line(path, number, row) for number, row in enumerate(rows, 1)]
        if lines[0].tag != "log":
            raise UsageError(f"{path} does not begin as an event log does: its first line is one of {lines[0].tag!r}")
        if (schema := lines[0].fields.get("schema")) != SCHEMA:
            raise UsageError(
                f"{path} has events of schema {schema}, this pageferry knows {SCHEMA}: use the one it is of"
            )
        try:
            last = lines.pop() if lines[-1].tag == "end" else None
            end, ended_at = (last.to(LogEnd), last.at) if last is not None else (None, None)
            return cls(path, lines[0].to(LogHeader), lines[1:], end, ended_at, cut)
        except msgspec.ValidationError as wrong:
            raise UsageError(f"{path}: its first or last line is damaged ({wrong})") from wrong


def _line(path: Path, number: int, row: bytes) -> Line:
    try:
        fields = msgspec.json.decode(row, type=dict[str, Any])
        return Line(float(fields.pop("at-ms")), str(fields.pop("type")), fields)
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as wrong:
        raise UsageError(f"{path}, line {number}: no event ({wrong})") from wrong
