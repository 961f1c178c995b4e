"""Room for memory at the destination: for large pages before the first page comes (S6), for all of it before Commit."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Sequence

from pageferry._engine import PageSet, Placer
from pageferry.errors import WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.compaction import compact_memory
from pageferry.memory.regions import SMALL_PAGE, Region
from pageferry.migration.native import off_loop

_TIMEOUT = 1.0
"""Seconds that a post-copy migration waits for its large pages, while the workload runs at the source; the pager goes
on with what is left."""
_PIECE = 32
"""Large pages allocated at a time: some 10 ms."""


async def compact(regions: Sequence[Region], large: Sequence[Sequence[bool]]) -> None:
    """Have as many large pages free as the source has in use; those of hugetlbfs are reserved already."""
    wanted = sum(sum(units) for region, units in zip(regions, large, strict=True) if region.page_size == SMALL_PAGE)
    await in_thread(compact_memory, wanted)


async def allocate(placer: Placer, large: Sequence[Sequence[bool]]) -> None:
    """Allocate all large pages: the kernel clears each, and whoever comes to it first would wait for that."""
    deadline = time.monotonic() + _TIMEOUT
    for region, units in enumerate(large):
        chosen = [unit for unit, is_large in enumerate(units) if is_large]
        for start in range(0, len(chosen), _PIECE):
            if time.monotonic() > deadline:
                return
            piece = chosen[start : start + _PIECE]
            await off_loop(lambda: placer.allocate_ahead(region, piece))  # noqa: B023


def check_space(regions: Sequence[Region], missing: Sequence[PageSet]) -> None:
    """Raises WorkloadError if a file system is too small for the pages that come after the workload runs.

    A file system of limited size would be full then, and the workload wait forever. What was allocated in advance
    counts as room. hugetlbfs has reserved its pages when they were mapped.
    """
    needed: dict[int, int] = defaultdict(int)
    files = {region.fd: os.fstat(region.fd) for region in regions if region.page_size == SMALL_PAGE}
    limits = {found.st_dev: os.fstatvfs(fd) for fd, found in files.items()}
    for region, pages in zip(regions, missing, strict=True):
        if region.fd in files:
            needed[files[region.fd].st_dev] += len(pages) * SMALL_PAGE
    for device, limit in limits.items():
        allocated = sum(found.st_blocks * 512 for found in files.values() if found.st_dev == device)
        room = limit.f_bavail * limit.f_frsize + allocated
        if limit.f_blocks and needed[device] > room:
            raise WorkloadError(
                f"the file system of the memory has room for {room >> 20} MiB, {needed[device] >> 20} MiB are to come: "
                f"mount it with a larger size"
            )
