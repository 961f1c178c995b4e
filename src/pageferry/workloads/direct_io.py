"""Direct I/O: devices and the kernel write to pinned pages directly, without the page tables of the process.

`get_user_pages` for writing marks a page as written when it pins the page, and a write trace (S2) records that. The
trace does not record the later write of the device. Therefore, after a collection, a page may be read only when all I/O
that had pinned the page has completed: `Drains` waits for such I/O. Buffers registered with io_uring stay pinned until
they are unregistered, and all of their pages are sent in the pause (`registered_buffers`). docs/decisions/0012 gives
the rationale.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pageferry._engine import PageSet
from pageferry.errors import WorkloadError
from pageferry.memory.regions import SMALL_PAGE, Placed

DRAIN_TIMEOUT = 10.0
"""Maximum duration of a drain, seconds. The workload may be paused for this time."""

PAUSE_TIMEOUT = 60.0
"""Maximum time for pausing a workload in an operation, seconds. It includes the time in which QEMU writes out the
cached data of its disks."""

_ATTEMPTS = 200
_RETRY = 0.005
_RING = "anon_inode:[io_uring]"
_COUNT = re.compile(rb"^UserBufs:\t(\d+)$", re.MULTILINE)
_BUFFER = re.compile(rb" *\d+: (?:0x([0-9a-f]+)/(\d+)|<none>)")


class Drainable(Protocol):
    """Part of the interface of a workload that a drain needs; see `workloads.protocols.Migratable`."""

    async def drain(self) -> float | None:
        """See `Migratable`."""


class Drains:
    """Drains of one migration or checkpoint."""

    def __init__(self, workload: Drainable) -> None:
        self.workload = workload
        self.due = False
        """Whether the trace has been installed or collected since the last drain. Memory may then be read only after a
        drain.
        """
        self.count = 0
        self.seconds = 0.0
        """Total time for which the workload was paused by drains, seconds."""
        self.longest = 0.0

    async def drain_if_due(self) -> None:
        """Wait for direct I/O that may have begun before the last collection of the trace. Call this before reading
        memory.

        Raises WorkloadError if the I/O does not complete (see `Migratable.drain`), UnsupportedError if a device keeps
        memory pinned, WorkloadDied.
        """
        if not self.due:
            return
        seconds = await self.workload.drain()
        if seconds is not None:
            self.count += 1
            self.seconds += seconds
            self.longest = max(self.longest, seconds)
        self.due = False


class Pausable(Protocol):
    """Part of the interface of a workload that `pause_briefly` needs."""

    async def pause(self) -> None:
        """See `Migratable`."""

    async def resume(self) -> None:
        """See `Migratable`."""


async def pause_briefly(workload: Pausable) -> float:
    """Drain a workload whose `pause` waits for direct I/O. Return the duration in seconds.

    The workload is resumed even if the call is cancelled.
    """
    started = time.perf_counter()
    try:
        await workload.pause()
    finally:
        await asyncio.shield(workload.resume())
    return time.perf_counter() - started


def registered_buffers(regions: Sequence[Placed]) -> list[PageSet]:
    """Return, per region, the pages in buffers that the processes of its segments have registered with io_uring.

    Such pages are pinned until the buffer is unregistered, and no trace records writes through the pins. Raises
    WorkloadError if the list of buffers of a process stays locked, PermissionError.
    """
    found = [PageSet(region.length // SMALL_PAGE) for region in regions]
    pids = {segment.pid for region in regions for segment in region.segments}
    buffers = {pid: list(_buffers(pid)) for pid in pids}
    for region, pages in zip(regions, found, strict=True):
        for segment in region.segments:
            for address, length in buffers[segment.pid]:
                first = max(address, segment.address) - segment.address + segment.offset
                end = min(address + length, segment.address + segment.length) - segment.address + segment.offset
                if first < end:
                    pages.insert(first // SMALL_PAGE, -(-end // SMALL_PAGE))
    return found


def _buffers(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the address and length of every registered buffer of a process."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        numbers = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):  # the process has exited: the operation on its memory reports that
        return
    for number in numbers:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # closed since it was listed
            if os.readlink(folder / number) == _RING:
                yield from _buffers_of(pid, number)


def _buffers_of(pid: int, number: str) -> list[tuple[int, int]]:
    """Return the buffers of one ring. The kernel omits them from fdinfo while another thread holds the ring's lock, so
    retry. Raises WorkloadError if the lock stays held."""
    for _ in range(_ATTEMPTS):
        text = Path(f"/proc/{pid}/fdinfo/{number}").read_bytes()
        if (buffers := parse_buffers(text)) is not None:
            return buffers
        time.sleep(_RETRY)
    raise WorkloadError(f"cannot list the io_uring buffers of process {pid}: the ring is busy; retry")


def parse_buffers(fdinfo: bytes) -> list[tuple[int, int]] | None:
    """Return (address, length) of the buffers in the fdinfo of a ring; None if the kernel has omitted them."""
    counted = _COUNT.search(fdinfo)
    if counted is None:
        return None
    found = []
    lines = iter(fdinfo[counted.end() + 1 :].split(b"\n"))
    for _ in range(int(counted[1])):
        matched = _BUFFER.fullmatch(next(lines, b""))
        if matched is None:
            return None
        if matched[1]:
            found.append((int(matched[1], 16), int(matched[2])))
    return found
