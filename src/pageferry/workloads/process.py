"""Any process as a workload: its memory can be saved while it is stopped. Nothing makes it run elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pageferry._engine import ProcessRange, Space
from pageferry.errors import UnsupportedError, UsageError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.python import start_python
from pageferry.memory.regions import SMALL_PAGE, Identity
from pageferry.memory.view import Readable
from pageferry.workloads.protocols import Faults

PREFIX = "pid:"
"""Names of processes: `pid:4711`."""
MOST_REGIONS = 4096
_STOP_TIMEOUT = 5.0
"""Seconds for all threads to stop; one in an uninterruptible sleep takes as long as that does."""


@dataclass(frozen=True, slots=True)
class Range:
    """A part of a process's memory."""

    name: str
    address: int
    length: int
    """Bytes."""
    page_size: int = SMALL_PAGE


class ProcessMemory(Readable):
    """What a checkpoint needs to know about the memory of a process; as `memory.view.Memory`."""

    def __init__(self, pid: int, regions: tuple[Range, ...]) -> None:
        self.regions = regions
        space = Space(pid)
        self.mappings = [ProcessRange(space, region.address, region.length) for region in regions]
        self.segments: list[Any] = []
        """Nothing is traced: the process is stopped."""

    def large_units(self) -> list[list[bool]]:
        """None: nothing is restored to them."""
        return [[] for _ in self.regions]

    def restore_large_mappings(self, units: list[list[bool]]) -> None:
        """Nothing: none were split."""


class ProcessWorkload:
    """A process, paused by SIGSTOP. It runs on when we die: a guardian sees to that."""

    def __init__(self, pid: int, ranges: str) -> None:
        """`ranges`, separated by commas: `heap`, `stack`, `anon` (all private anonymous memory that it may write to),
        or START-END in hexadecimal.

        Raises UsageError for ranges that there are not, or our own process; WorkloadDied, WorkloadError.
        """
        if proc.start_time(pid) is None:
            raise WorkloadDied(f"no process {pid}")
        if pid == os.getpid():
            raise UsageError("cannot save the process of this command: it cannot stop itself")
        self.name = f"{PREFIX}{pid}"
        self.pid = pid
        self._command = proc.command(pid)
        self.regions = tuple(_chosen(pid, ranges))
        self._pidfd = os.pidfd_open(pid)
        self._guardian: subprocess.Popen[bytes] | None = None
        self._was_stopped = False

    @classmethod
    def named(cls, name: str, ranges: str | None) -> ProcessWorkload:
        """From a name such as `pid:4711`. Raises as the constructor."""
        number = name.removeprefix(PREFIX)
        if not number.isdecimal():
            raise UsageError(f"invalid process {name}: expected pid: and a number")
        if ranges is None:
            raise UsageError(f"cannot save {name}: no memory selected; set `regions` to heap, stack, anon or START-END")
        return cls(int(number), ranges)

    @property
    def identity(self) -> Identity:
        """The process and its command."""
        return Identity("process", self.name, {"command": self._command, "pid": self.pid})

    def memory(self) -> ProcessMemory:
        """Its memory, for a checkpoint. Raises WorkloadDied, WorkloadError where it may not be read."""
        try:
            return ProcessMemory(self.pid, self.regions)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{self.name} has ended") from gone
        except PermissionError as denied:
            raise WorkloadError(f"cannot read the memory of {self.name}: permission denied; run as root") from denied

    async def prepare_pause(self) -> None:
        """Start the guardian."""
        if self._guardian is None:
            self._guardian = self._start_guardian()

    async def pause(self) -> None:
        """SIGSTOP, and wait until every thread has stopped. Raises WorkloadError when one does not."""
        await self.prepare_pause()
        self._was_stopped = _stopped(self.pid)
        self._signal(signal.SIGSTOP)
        end = time.monotonic() + _STOP_TIMEOUT
        while not _stopped(self.pid):
            if time.monotonic() > end:
                await self.resume()
                raise WorkloadError(
                    f"cannot stop {self.name} within {_STOP_TIMEOUT:g} s: it is blocked in the kernel; retry"
                )
            await asyncio.sleep(0.001)

    async def resume(self) -> None:
        """SIGCONT, unless it was stopped before."""
        if not self._was_stopped:
            self._signal(signal.SIGCONT)
        self._dismiss()

    async def save_state(self) -> bytes:
        """Nothing: registers and files are not saved."""
        return b""

    async def load_state(self, state: bytes) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(f"cannot restore {self.name}: memory of a process can be saved, not restored")

    async def commit(self) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(f"cannot migrate {self.name}: it is a process, not a managed workload")

    async def discard(self) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError(f"cannot end {self.name}: it is a process, not a managed workload")

    async def running(self) -> bool:
        """Whether it runs. Raises WorkloadDied when it is gone."""
        return not _stopped(self.pid)

    def faults(self) -> Faults:
        """Page faults of all its threads."""
        return Faults(*proc.thread_faults(self.pid, proc.threads(self.pid)))

    def close(self) -> None:
        """Let go: if it is stopped by us it runs on."""
        if self._guardian is not None:
            assert self._guardian.stdin is not None
            self._guardian.stdin.close()
            self._guardian.wait()
            self._guardian = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _start_guardian(self) -> subprocess.Popen[bytes]:
        return start_python(
            "pageferry.workloads.process_guardian",
            str(self._pidfd),
            script=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[self._pidfd],
            start_new_session=True,
        )

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{self.name} has ended") from gone
        except PermissionError as denied:
            raise WorkloadError(
                f"cannot stop {self.name}: it belongs to another user; run as that user, or as root"
            ) from denied

    def _dismiss(self) -> None:
        """The guardian is not needed any more."""
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            assert guardian.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                guardian.stdin.write(b"done\n")
                guardian.stdin.close()
            guardian.wait()


def _stopped(pid: int) -> bool:
    states = proc.thread_states(pid)
    if all(state in "ZXx" for state in states):
        raise WorkloadDied(f"process {pid} has ended")
    return all(state in "TtZXx" for state in states)


def _chosen(pid: int, ranges: str) -> Iterator[Range]:
    mappings = list(_anonymous(pid))
    found: dict[int, Range] = {}
    for word in ranges.split(","):
        for part in _matching(word.strip(), mappings):
            found[part.address] = part
    if len(found) > MOST_REGIONS:
        raise UsageError(
            f"cannot save {ranges}: {len(found)} mappings, at most {MOST_REGIONS} can be saved; select some by "
            "START-END"
        )
    yield from (found[address] for address in sorted(found))


def _matching(word: str, mappings: list[Range]) -> list[Range]:
    if span := re.fullmatch(r"(?:0x)?([0-9a-f]+)-(?:0x)?([0-9a-f]+)", word, re.IGNORECASE):
        start, end = (int(part, 16) for part in span.groups())
        if start % SMALL_PAGE or end % SMALL_PAGE or start >= end:
            raise UsageError(f"invalid range {word}: expected page-aligned addresses, the lower one first")
        return [Range(f"{start:x}-{end:x}", start, end - start)]
    match word:
        case "heap" | "stack":
            found = [mapping for mapping in mappings if mapping.name.endswith(f"[{word}]")]
        case "anon":
            found = mappings
        case _:
            raise UsageError(f"invalid --regions entry {word!r}: expected heap, stack, anon or START-END")
    if not found:
        raise UsageError(f"cannot save {word}: the process has no such mapping")
    return found


def _anonymous(pid: int) -> Iterator[Range]:
    """Private writable memory without a file behind it."""
    try:
        mappings = proc.mappings(pid)
    except PermissionError as denied:
        raise WorkloadError(f"the memory of process {pid} may not be read: run as root") from denied
    for one in mappings:
        if one.inode == 0 and one.access == "rw-" and not one.shared:
            span = f"{one.address:08x}-{one.end:08x}"
            yield Range(" ".join([span, one.name]) if one.path else span, one.address, one.length)
