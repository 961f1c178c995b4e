"""Transfer of memory that is still deferred at the source, where a restore is in progress (S8, S10).

Pages are loaded one part ahead of sending, so that sending starts while almost all pages are deferred. Parts grow,
because each costs a scan of the pages that are present.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial

from pageferry._engine import BlockSender, Mapping, PageSet, ProcessRange
from pageferry.host.fault_points import fault_point
from pageferry.memory.regions import SMALL_PAGE
from pageferry.migration.engine_call import off_loop
from pageferry.workloads.deferred_access import AcquiredPager

FIRST_PART = (16 << 20) // SMALL_PAGE
"""Number of pages of the first part. Each further part has twice as many, up to the limit that `MIN_PARTS` sets."""
MIN_PARTS = 16
"""Divisor for the maximum size of a part: the number of all pages divided by `MIN_PARTS`, but at least `FIRST_PART`."""

Part = tuple[int, int, int]
"""Part of a region, as (index of the region, first page, number of pages)."""


async def send_deferred(
    hold: AcquiredPager,
    sender: BlockSender,
    mappings: Sequence[Mapping | ProcessRange],
    pages: Sequence[PageSet],
    number: int,
) -> None:
    """Send these pages, one set per region, as round `number`, and load deferred pages ahead of sending them.

    Raises the errors of `BlockSender.send`, and RestoreError or ImageError if contents cannot be loaded.
    """
    none = [PageSet(region.pages) for region in pages]
    loading: asyncio.Task[None] | None = None
    found = [part for part in parts([region.pages for region in pages]) if _of(pages, part)]
    try:
        for part, following in zip(found, [*found[1:], None], strict=True):
            await (loading or _load(hold, part))
            loading = asyncio.create_task(_load(hold, following)) if following is not None else None
            sets = [*none[: part[0]], _of(pages, part), *none[part[0] + 1 :]]
            await off_loop(partial(sender.send, mappings, sets, number, barrier=False), cancel=sender.cancel)
            fault_point("source.part-sent")
    finally:
        if loading is not None:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
    await off_loop(partial(sender.send, mappings, none, number), cancel=sender.cancel)


def part_of(region: PageSet, first: int, count: int) -> PageSet:
    """Return the pages of a set that are among `count` pages from `first` on. The range may exceed the region."""
    part = region.copy()
    part.remove(0, first)
    part.remove(min(first + count, region.pages), region.pages)
    return part


def parts(regions: Sequence[int]) -> Iterator[Part]:
    """Yield the parts of all regions, in order. `regions`: number of pages of each region."""
    size, most = FIRST_PART, max(FIRST_PART, sum(regions) // MIN_PARTS)
    for region, pages in enumerate(regions):
        first = 0
        while first < pages:
            count = min(size, pages - first)
            yield region, first, count
            first += count
            size = min(size * 2, most)


async def load_all(hold: AcquiredPager, regions: Sequence[int]) -> None:
    """Load all deferred pages. `regions`: number of pages of each region.

    Post-copy requires this: the source must hold every page that it serves.
    """
    for part in parts(regions):
        await _load(hold, part)


def _of(pages: Sequence[PageSet], part: Part) -> PageSet:
    """Return the pages of the sets that lie in a part."""
    region, first, count = part
    return part_of(pages[region], first, count)


async def _load(hold: AcquiredPager, part: Part) -> None:
    await off_loop(partial(hold.ensure, *part), cancel=hold.cancel)
