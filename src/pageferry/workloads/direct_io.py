"""Direct I/O: devices and the kernel write to memory past all page tables, through pages that they have pinned.

`get_user_pages` for write marks a page as written when it pins it, and a write trace (S2) sees that. It does not see
what the device writes later. So no page may be read between its collection and the end of an I/O that had pinned it
before: `Drains` waits for such I/O. Buffers registered with io_uring stay pinned for good, and are sent as a whole in
the pause (`registered_buffers`). docs/decisions/0012 has the argument.
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
from pageferry.memory.regions import SMALL_PAGE, Region

DRAIN_TIMEOUT = 10.0
"""Seconds that a drain may take. The workload may be paused for as long."""

PAUSE_TIMEOUT = 60.0
"""Seconds that the pause of an operation may take: QEMU also writes out the cached data of its disks."""

_ATTEMPTS = 200
_RETRY = 0.005
_RING = "anon_inode:[io_uring]"
_COUNT = re.compile(rb"^UserBufs:\t(\d+)$", re.MULTILINE)
_BUFFER = re.compile(rb" *\d+: (?:0x([0-9a-f]+)/(\d+)|<none>)")


class Drainable(Protocol):
    """As much of a workload as a drain needs; see `workloads.protocols.Workload`."""

    async def drain(self) -> float | None:
        """As of `Workload`."""


class Drains:
    """The drains of one migration or checkpoint."""

    def __init__(self, workload: Drainable) -> None:
        self.workload = workload
        self.due = False
        """The trace has been installed or collected since the last drain: before memory is read there must be one."""
        self.count = 0
        self.seconds = 0.0
        """That the workload was paused for, together."""
        self.longest = 0.0

    async def drain_if_due(self) -> None:
        """Before memory is read: wait for direct I/O that may be older than the last collection of the trace.

        Raises WorkloadError where it does not end in time, UnsupportedError for pins that never end, WorkloadDied.
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
    """As much of a workload as `pause_briefly` needs."""

    async def pause(self) -> None:
        """As of `Workload`."""

    async def resume(self) -> None:
        """As of `Workload`."""


async def pause_briefly(workload: Pausable) -> float:
    """Drain a workload whose `pause` waits for direct I/O; return the seconds that took.

    A cancellation does not leave it paused.
    """
    started = time.perf_counter()
    try:
        await workload.pause()
    finally:
        await asyncio.shield(workload.resume())
    return time.perf_counter() - started


def registered_buffers(regions: Sequence[Region]) -> list[PageSet]:
    """Per region, the pages that lie in buffers registered with io_uring by the processes that map it.

    Such pages are pinned until the buffer is unregistered: a write to them is reported by no trace. Raises
    WorkloadError where a process keeps its list of buffers busy, PermissionError.
    """
    found = [PageSet(region.length // SMALL_PAGE, False) for region in regions]
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
    """Address and length of every registered buffer of a process."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        numbers = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):  # it has ended: that is reported by whoever works on its memory
        return
    for number in numbers:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # closed meanwhile
            if os.readlink(folder / number) == _RING:
                yield from _buffers_of(pid, number)


def _buffers_of(pid: int, number: str) -> list[tuple[int, int]]:
    """Of one ring. The kernel leaves its list out of fdinfo while another thread holds the ring's lock."""
    for _ in range(_ATTEMPTS):
        text = Path(f"/proc/{pid}/fdinfo/{number}").read_bytes()
        if (buffers := parse_buffers(text)) is not None:
            return buffers
        time.sleep(_RETRY)
    raise WorkloadError(f"cannot list the io_uring buffers of process {pid}: the ring is busy; retry")


def parse_buffers(fdinfo: bytes) -> list[tuple[int, int]] | None:
    """(address, length) of the buffers in a ring's fdinfo; None where the kernel has left them out."""
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
