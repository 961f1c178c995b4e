"""Arbitrary processes as workloads: the memory of a process can be saved while the process is stopped. The process
cannot be migrated."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pageferry._engine import ProcessRange, Space
from pageferry.errors import UsageError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.guardian import Guardian, SendSignal
from pageferry.memory.regions import SMALL_PAGE, Identity
from pageferry.memory.view import Readable
from pageferry.workloads.protocols import Faults

PREFIX = "pid:"
"""Prefix of the names of processes: `pid:4711`."""
MAX_REGIONS = 4096
_STOP_TIMEOUT = 5.0
"""Maximum time until all threads have stopped, seconds. A thread in an uninterruptible sleep stops when it wakes."""


@dataclass(frozen=True, slots=True)
class Range:
    """Range of the memory of a process."""

    name: str
    address: int
    length: int
    """Length, bytes."""
    page_size: int = SMALL_PAGE


class ProcessMemory(Readable):
    """Memory of a process, with the interface that a checkpoint needs; see `memory.view.Memory`."""

    def __init__(self, pid: int, regions: tuple[Range, ...]) -> None:
        self.regions = regions
        space = Space(pid)
        self.mappings = [ProcessRange(space, region.address, region.length) for region in regions]


class ProcessWorkload:
    """Process that is paused by SIGSTOP. If pageferry exits, a guardian continues the process."""

    def __init__(self, pid: int, ranges: str) -> None:
        """Open the process `pid`. `ranges`, separated by commas: `heap`, `stack`, `anon` (all private anonymous memory
        that the process may write to), or START-END in hexadecimal.

        Raises UsageError for ranges that do not exist, or for the process of the caller. Raises WorkloadDied if there
        is no such process. Also raises WorkloadError.
        """
        if proc.start_time(pid) is None:
            raise WorkloadDied(f"cannot open process {pid}: there is no such process")
        if pid == os.getpid():
            raise UsageError(
                "cannot save the process of this command: it cannot stop itself; save it with another command"
            )
        self.name = f"{PREFIX}{pid}"
        self.pid = pid
        self._command = proc.command(pid)
        self.regions = tuple(_chosen(pid, ranges))
        self._pidfd = os.pidfd_open(pid)
        self._guardian: Guardian | None = None
        self._was_stopped = False

    @classmethod
    def named(cls, name: str, ranges: str | None) -> ProcessWorkload:
        """Open the process with a name such as `pid:4711`. Raises the same errors as the constructor, and UsageError if
        the name is invalid or `ranges` is None."""
        number = name.removeprefix(PREFIX)
        if not number.isdecimal():
            raise UsageError(f"invalid process {name}: expected pid: and a number")
        if ranges is None:
            raise UsageError(f"cannot save {name}: no memory selected; set `regions` to heap, stack, anon or START-END")
        return cls(int(number), ranges)

    @property
    def identity(self) -> Identity:
        """Process id and command of the process."""
        return Identity("process", self.name, {"command": self._command, "pid": self.pid})

    @property
    def live(self) -> None:
        """None: the process can only be saved while it is stopped."""

    @property
    def stays_paused(self) -> bool:
        """Whether the process was already stopped before `pause`."""
        return self._was_stopped

    def open_memory(self) -> ProcessMemory:
        """Return the memory of the process for a checkpoint. Raises WorkloadDied, WorkloadError if access is denied."""
        try:
            return ProcessMemory(self.pid, self.regions)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{self.name} has exited") from gone
        except PermissionError as denied:
            raise WorkloadError(f"cannot read the memory of {self.name}: permission denied; run as root") from denied

    async def prepare_pause(self) -> None:
        """Start the guardian, which continues the process if pageferry exits."""
        if self._guardian is None:
            self._guardian = Guardian(self.name, [self._pidfd])
            self._guardian.plan([SendSignal(self._pidfd, signal.SIGCONT)])

    async def pause(self) -> None:
        """Send SIGSTOP, and wait until all threads have stopped. Raises WorkloadError if a thread does not stop."""
        await self.prepare_pause()
        self._was_stopped = _stopped(self.pid)
        self._signal(signal.SIGSTOP)
        end = time.monotonic() + _STOP_TIMEOUT
        while not _stopped(self.pid):
            if time.monotonic() > end:
                await self.resume()
                raise WorkloadError(
                    f"cannot stop {self.name}: it has been blocked in the kernel for {_STOP_TIMEOUT:g} s; retry"
                )
            await asyncio.sleep(0.001)

    async def resume(self) -> None:
        """Send SIGCONT, unless the process was already stopped before `pause`."""
        if not self._was_stopped:
            self._signal(signal.SIGCONT)
        self._dismiss()

    async def save_state(self) -> bytes:
        """Return an empty state: registers and files are not saved."""
        return b""

    async def running(self) -> bool:
        """Return whether the process runs. Raises WorkloadDied if it has exited."""
        return not _stopped(self.pid)

    def faults(self) -> Faults:
        """Return the page faults of all threads of the process."""
        return Faults(*proc.thread_faults(self.pid, proc.threads(self.pid)))

    def close(self) -> None:
        """Close all descriptors. A process that was stopped by this object continues."""
        if self._guardian is not None:
            self._guardian.finish()
            self._guardian = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{self.name} has exited") from gone
        except PermissionError as denied:
            raise WorkloadError(
                f"cannot stop {self.name}: it belongs to another user; run as that user, or as root"
            ) from denied

    def _dismiss(self) -> None:
        """End the guardian, which is no longer needed."""
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            guardian.plan([])
            guardian.finish()


def _stopped(pid: int) -> bool:
    states = proc.thread_states(pid)
    if all(state in "ZXx" for state in states):
        raise WorkloadDied(f"process {pid} has exited")
    return all(state in "TtZXx" for state in states)


def _chosen(pid: int, ranges: str) -> Iterator[Range]:
    mappings = list(_anonymous(pid))
    found: dict[int, Range] = {}
    for word in ranges.split(","):
        for part in _matching(word.strip(), mappings):
            found[part.address] = part
    if len(found) > MAX_REGIONS:
        raise UsageError(
            f"cannot save {ranges}: {len(found)} mappings, the limit is {MAX_REGIONS}; select fewer by START-END"
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
    """Yield the private, writable, anonymous mappings of a process. Raises WorkloadError if access is denied."""
    try:
        mappings = proc.mappings(pid)
    except PermissionError as denied:
        raise WorkloadError(f"cannot read the memory of process {pid}: permission denied; run as root") from denied
    for one in mappings:
        if one.inode == 0 and one.access == "rw-" and not one.shared:
            span = f"{one.address:08x}-{one.end:08x}"
            yield Range(" ".join([span, one.name]) if one.path else span, one.address, one.length)
