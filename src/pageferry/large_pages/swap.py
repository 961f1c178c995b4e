"""Breaking large pages of low activity, and sending their cold small pages to swap.

Breaking is MADV_COLD on one small page, from outside (process_madvise): it splits a large page that nobody else maps.
What follows depends on what is behind it:

* Private memory: MADV_PAGEOUT over all of it. Which of its small pages are in use is not known: they come back when
  they are accessed next.
* Shared memory: the split takes its mapping away, so that the workload maps what it accesses, small page by small page,
  and nothing else. The cold ones are mapped by us and paged out of there, which works for pages that nobody else maps:
  one that the workload has begun to use again stays.

The kernel itself brings pages back on access, so nothing depends on us afterwards. khugepaged leaves large pages alone
of which more than `max_ptes_swap` (64 by default) small pages are in swap.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

from pageferry.errors import UnsupportedError
from pageferry.host import proc
from pageferry.host.meminfo import meminfo
from pageferry.host.smaps import total
from pageferry.large_pages.sampler import Activity, cold_runs
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.workloads.target import Target

_MADV_COLD, _MADV_PAGEOUT, _MADV_POPULATE_READ = 20, 21, 22


def check_swap() -> None:
    """Raises UnsupportedError where there is no swap to reclaim to."""
    if len(proc.lines(Path("/proc/swaps").read_bytes())) < 2:
        raise UnsupportedError("this host has no swap to reclaim to: add some (swapon), or leave `reclaim` out")
    if meminfo()["SwapFree"] < LARGE_PAGE:
        raise UnsupportedError("swap is full: add some (swapon), or leave `reclaim` out")


def to_swap(target: Target, idle: list[Activity]) -> tuple[int, int]:
    """Break these large pages and send their cold small pages to swap.

    Returns how many were broken, and the bytes that the workload has in swap now and had not before (`Swap` in smaps).
    A page that somebody else maps, or that has changed meanwhile, is left as it is.
    """
    before = {pid: total(pid, "Swap") for pid in target.pids}
    broken = sum(_reclaim(target, activity) for activity in idle)
    return broken, sum(total(pid, "Swap") - bytes_before for pid, bytes_before in before.items())


def _reclaim(target: Target, activity: Activity) -> bool:
    area, address = activity.page.area, activity.page.address
    space = target.space(area.pid)
    try:
        space.advise(address, SMALL_PAGE, _MADV_COLD)
        if any(start <= address < end for start, end in space.large_mapped(address, LARGE_PAGE)):
            return False
        if area.kind == "anon":
            space.advise(address, LARGE_PAGE, _MADV_PAGEOUT)
        else:
            _page_out_shared(target, activity)
    except OSError:  # unmapped, locked or gone: it is not ours to reclaim
        target.check_alive(area.pid)
        return False
    return True


def _page_out_shared(target: Target, activity: Activity) -> None:
    area = activity.page.area
    assert area.region is not None
    assert activity.touched is not None
    region = target.regions[area.region]
    offset = region.file_offset + area.offset + activity.page.address - area.address
    with contextlib.closing(mmap.mmap(region.fd, LARGE_PAGE, offset=offset)) as memory:
        for first, last in cold_runs(activity.touched):
            start, length = first * SMALL_PAGE, (last - first) * SMALL_PAGE
            memory.madvise(_MADV_POPULATE_READ, start, length)
            memory.madvise(_MADV_PAGEOUT, start, length)
