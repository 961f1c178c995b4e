"""Operations of one host: processes of `pageferry` that outlive the agent, and their durable records.

::

    RUN/.fleet/ID/order.json      `Order`: what was started, before anything is started
    RUN/.fleet/ID/process.json    pid of the supervisor (`operation_process`), which identifies it with its start time
    RUN/.fleet/ID/stdout          events of the command, as JSON lines
    RUN/.fleet/ID/stderr          error of the command
    RUN/.fleet/ID/ended.json      exit code of the command
    RUN/.fleet/ID/cancelled       the supervisor must not start the command

The agent keeps no other state. An agent that has been started again reads these records. An operation without an end
of which no process runs is lost: the registry, and a recovery, determine what it has done.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pageferry.errors import FleetError, UsageError
from pageferry.fleet.protocol import Kind, Moved, OperationReport, State
from pageferry.host import files, proc, processes
from pageferry.host.python import python_command, start_python
from pageferry.host.registry import MAX_RECORD, Registry, check_name

FOLDER = ".fleet"
KEPT = 50
"""Number of ended operations whose records are kept."""
_HEAD, _END = 16 << 10, 64 << 10
"""Bytes at the beginning and at the end of the output of a command that a report considers."""
_TAIL = 4096
"""Bytes of an error message that a report contains."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Record of an operation."""

    id: str
    kind: Kind
    workload: str
    peer: str | None = None
    command: list[str]
    """Arguments of `pageferry`."""
    started: float
    moved: Moved | None = None
    """Workload that the operation creates on this host."""


class _Supervisor(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    started: int
    boot: str


class _Child(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    started: int


class _End(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    exit_code: int


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of the host whose registry is given."""

    registry: Registry

    @property
    def path(self) -> Path:
        """Directory of the records."""
        return self.registry.path / FOLDER

    def start(self, order: Order) -> None:
        """Start an operation, unless an operation with this identifier exists. Raises UsageError, FleetError."""
        check_name(order.id)
        folder = self.path / order.id
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.check_private(self.path, "remove it")
            folder.mkdir(mode=0o700)
        except FileExistsError:
            return
        except OSError as error:
            raise FleetError(f"cannot record the operation {order.id} in {self.path}: {error.strerror}") from error
        files.replace_file(folder / "order.json", msgspec.json.encode(order), synced=True)
        self._prune()
        pid = _launch(folder, order.command)
        started = proc.start_time(pid)
        if started is not None:
            record = _Supervisor(pid=pid, started=started, boot=proc.boot_id())
            files.replace_file(folder / "process.json", msgspec.json.encode(record), synced=False)

    def report(self, identifier: str) -> OperationReport:
        """Return the state of an operation. Raises UsageError if it is unknown."""
        check_name(identifier)
        folder = self.path / identifier
        order = _load(folder / "order.json", Order)
        if order is None:
            raise UsageError(f"cannot find the operation {identifier}: this host has no record of it; check the name")
        state, end = self._state(folder)
        events = _events(folder / "stdout")
        last = events[-1] if events else None
        return OperationReport(
            id=order.id,
            kind=order.kind,
            workload=order.workload,
            peer=order.peer,
            state=state,
            exit_code=None if end is None else end.exit_code,
            message=_message(folder),
            address=next((one.get("address") for one in events if one.get("type") == "listening"), None),
            received=any(one.get("type") == "received" for one in events),
            fraction=_fraction(events),
            started=order.started,
            result=last if state == "ended" and last is not None else None,
        )

    def reports(self) -> Iterator[OperationReport]:
        """Yield the states of all recorded operations, oldest first."""
        orders = (_load(folder / "order.json", Order) for folder in self._folders())
        for order in sorted((one for one in orders if one is not None), key=lambda one: one.started):
            with contextlib.suppress(UsageError, FileNotFoundError):  # removed meanwhile
                yield self.report(order.id)

    def workloads(self) -> Iterator[Moved]:
        """Yield the workloads that the recorded operations have created, and that exist."""
        for folder in self._folders():
            order = _load(folder / "order.json", Order)
            if order is None or order.moved is None:
                continue
            # A workload of the same name that another program has started later has another command line.
            entry, end = self.registry.path / order.workload / "workload.json", folder / "ended.json"
            with contextlib.suppress(OSError):
                last = end.stat().st_mtime if end.exists() else time.time()
                if order.started <= entry.stat().st_mtime <= last:
                    yield order.moved

    def interrupt(self, identifier: str, number: signal.Signals = signal.SIGINT) -> None:
        """Send a signal to the command of an operation that is running. Raises UsageError if it is unknown."""
        if self.report(identifier).state != "running":
            return
        child = _load(self.path / identifier / "running.json", _Child)
        if child is not None:
            processes.send_signal(child.pid, child.started, number)

    def cancel_starts(self, kind: Kind, workload: str) -> None:
        """Forbid the start of commands of a kind for a workload that have not started yet. Raises OSError."""
        for folder in self._folders():
            order = _load(folder / "order.json", Order)
            if order is None or order.kind != kind or order.workload != workload:
                continue
            if not any((folder / name).exists() for name in ("running.json", "ended.json", "cancelled")):
                files.replace_file(folder / "cancelled", b"", synced=False)

    def _state(self, folder: Path) -> tuple[State, _End | None]:
        if (end := _load(folder / "ended.json", _End)) is not None:
            return "ended", end
        found = _load(folder / "process.json", _Supervisor)
        if found is None:
            # The agent may be about to write it. An agent that was killed in between has left a lost operation.
            return ("running" if time.time() - folder.stat().st_mtime < 5 else "lost"), None
        alive = found.boot == proc.boot_id() and (proc.is_alive(found.pid, found.started) or self._command_runs(folder))
        if not alive and (end := _load(folder / "ended.json", _End)) is not None:  # it has ended meanwhile
            return "ended", end
        return ("running" if alive else "lost"), None

    def _command_runs(self, folder: Path) -> bool:
        """Return whether the command of an operation runs, although its supervisor was killed."""
        child = _load(folder / "running.json", _Child)
        return child is not None and proc.is_alive(child.pid, child.started)

    def _folders(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return [one for one in self.path.iterdir() if one.is_dir()]
        return []

    def _prune(self) -> None:
        """Remove the records of the oldest operations that have ended, or are lost."""
        ended = [one for one in self._folders() if self._is_over(one)]
        for folder in sorted(ended, key=lambda one: one.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(folder, ignore_errors=True)

    def _is_over(self, folder: Path) -> bool:
        with contextlib.suppress(OSError):  # removed meanwhile, or not readable
            return self._state(folder)[0] != "running"
        return False


def _launch(folder: Path, command: Sequence[str]) -> int:
    """Start the supervisor of a command of pageferry, and return its pid. Raises FleetError."""
    words = msgspec.json.encode(python_command("pageferry", *command)).decode()
    with start_python(
        "pageferry.fleet.operation_process", str(folder), words, script=True, stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        said = starter.stdout.readline()
    if not said:
        raise FleetError(f"cannot start `pageferry {command[0]}`: its supervisor has not started; see {folder}")
    return int(said)


def _load(path: Path, kind: type[Any]) -> Any:
    """Return a record; None if there is none, or if it is not complete. Raises OSError if it cannot be read: what it
    records may have happened."""
    try:
        return msgspec.json.decode(files.read_regular(path, MAX_RECORD, follow=False), type=kind)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _events(path: Path) -> list[dict[str, Any]]:
    """Return the events that the command has written so far. An incomplete last line is left out."""
    try:
        with path.open("rb") as file:
            read = file.read(_HEAD)
            length = os.fstat(file.fileno()).st_size
            if length > _HEAD + _END:
                read = read[: read.rfind(b"\n") + 1]
                file.seek(length - _END)
                file.readline()
            lines = (read + file.read()).split(b"\n")[:-1]
    except OSError:
        return []
    events = []
    for line in lines:
        with contextlib.suppress(msgspec.MsgspecError):
            events.append(msgspec.json.decode(line, type=dict[str, Any]))
    return events


def _fraction(events: Sequence[dict[str, Any]]) -> float | None:
    """Return the progress of the first round of a migration, or of a transfer; None before the first event."""
    for event in reversed(events):
        if event.get("type") == "round":
            return 1.0
        if event.get("total") and "done" in event:
            return min(1.0, float(event["done"]) / float(event["total"]))
    return None


def _message(folder: Path) -> str:
    """Return the error that the command has printed, without its prefix."""
    try:
        text = (folder / "stderr").read_bytes()[-_TAIL:].decode(errors="replace")
    except OSError:
        return ""
    errors = [line.partition("error: ")[2] for line in text.splitlines() if line.startswith("pageferry: error: ")]
    return errors[-1] if errors else text.strip()


def now() -> float:
    """Return the time for `Order.started`, seconds since 1970."""
    return time.time()
