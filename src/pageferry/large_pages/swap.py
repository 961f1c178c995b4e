"""Reclaim to swap: split huge pages of low activity, and page out their cold base pages.

MADV_COLD on one base page, applied with process_madvise(2), splits a huge page that no other process maps. The next
step depends on the kind of memory:

* Private memory: MADV_PAGEOUT on the whole huge page, because the base pages in use are unknown. The kernel swaps these
  in on their next access.
* Shared memory: the split unmaps the huge page, so the workload maps only the base pages that it accesses again. This
  process maps the cold base pages, and pages them out through its mapping. MADV_PAGEOUT skips pages that another
  process maps, so a page that the workload uses again stays.

The kernel swaps pages in on demand, so nothing depends on this process afterwards. khugepaged does not collapse a huge
page of which more than `max_ptes_swap` (64 by default) base pages are in swap.
"""

from __future__ import annotations

from pathlib import Path

from pageferry._engine import Advice, Mapping, Space
from pageferry.errors import UnsupportedError
from pageferry.host import proc
from pageferry.host.proc import meminfo
from pageferry.host.smaps import total
from pageferry.large_pages.sampler import Activity, cold_runs
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.workloads.target import Target


def check_swap() -> None:
    """Raise UnsupportedError if the host has no swap space, or no free swap space."""
    if len(proc.lines(Path("/proc/swaps").read_bytes())) < 2:
        raise UnsupportedError(
            "cannot reclaim memory to swap: this host has no swap space; add some with swapon(8), or remove `reclaim`"
        )
    if meminfo()["SwapFree"] < LARGE_PAGE:
        raise UnsupportedError(
            "cannot reclaim memory to swap: the swap space is full; add some with swapon(8), or remove `reclaim`"
        )


def to_swap(target: Target, idle: list[Activity]) -> tuple[int, int]:
    """Split these huge pages and page out their cold base pages.

    Return the number of huge pages split, and the growth of the workload's swap usage in bytes (`Swap` in smaps). A
    page that another process maps, or that has changed, is not reclaimed.
    """
    before = {pid: total(pid, "Swap") for pid in target.pids}
    broken = sum(_reclaim(target, activity) for activity in idle)
    return broken, sum(total(pid, "Swap") - bytes_before for pid, bytes_before in before.items())


def _reclaim(target: Target, activity: Activity) -> bool:
    area, address = activity.page.area, activity.page.address
    space = target.space(area.pid)
    try:
        space.madvise(address, SMALL_PAGE, Advice.COLD)
        if any(start <= address < end for start, end in space.large_mapped(address, LARGE_PAGE)):
            return False
        if area.kind == "anon":
            space.madvise(address, LARGE_PAGE, Advice.PAGEOUT)
        else:
            _page_out_shared(target, activity)
    except OSError:  # unmapped, locked or freed since it was sampled
        target.check_alive(area.pid)
        return False
    return True


def _page_out_shared(target: Target, activity: Activity) -> None:
    area = activity.page.area
    assert area.region is not None
    assert activity.touched is not None
    region = target.regions[area.region]
    offset = region.file_offset + area.offset + activity.page.address - area.address
    memory, own = Mapping(region.fd, LARGE_PAGE, offset), Space()
    for first, last in cold_runs(activity.touched):
        address, length = memory.address + first * SMALL_PAGE, (last - first) * SMALL_PAGE
        own.madvise(address, length, Advice.POPULATE_READ)
        own.madvise(address, length, Advice.PAGEOUT)
