"""Preallocation at the destination: huge pages before the first page is received (S6), and a check of free space before
Commit."""

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
from pageferry.migration.engine_call import off_loop

_TIMEOUT = 1.0
"""Maximum time for allocating huge pages in post-copy, while the workload runs at the source, seconds. The pager
allocates the remaining huge pages."""
_CHUNK = 32
"""Number of huge pages allocated per call. A call takes about 10 ms."""


async def compact(regions: Sequence[Region], large: Sequence[Sequence[bool]]) -> None:
    """Compact memory until as many huge pages are free as the source uses. Pages of hugetlbfs are not counted, because
    they are already reserved."""
    wanted = sum(sum(units) for region, units in zip(regions, large, strict=True) if region.page_size == SMALL_PAGE)
    await in_thread(compact_memory, wanted)


async def allocate(placer: Placer, large: Sequence[Sequence[bool]]) -> None:
    """Allocate huge pages for at most `_TIMEOUT` seconds. The first access to a page then need not wait until
    the kernel has cleared the page."""
    deadline = time.monotonic() + _TIMEOUT
    for region, units in enumerate(large):
        chosen = [unit for unit, is_large in enumerate(units) if is_large]
        for start in range(0, len(chosen), _CHUNK):
            if time.monotonic() > deadline:
                return
            chunk = chosen[start : start + _CHUNK]
            await off_loop(lambda: placer.allocate_ahead(region, chunk))  # noqa: B023


def check_space(regions: Sequence[Region], missing: Sequence[PageSet]) -> None:
    """Raise WorkloadError if a file system is too small for the missing pages.

    Otherwise the workload would wait forever for a page that cannot be allocated. Space that is allocated to the files
    counts as free. Files on hugetlbfs are not checked: their pages were reserved when they were mapped.
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
                f"cannot receive the memory: its file system has {room >> 20} MiB of free space, "
                f"{needed[device] >> 20} MiB are required; mount it with a larger size"
            )
