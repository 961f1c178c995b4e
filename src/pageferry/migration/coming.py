"""Sending memory whose contents are still to come to the source itself: a restore is under way there (S8, S10).

Pages are brought just ahead of being sent, a part at a time, so that the first ones are on their way when hardly any
have come. Parts grow, because each costs a look at what is in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial

from pageferry._engine import BlockSender, Mapping, PageSet
from pageferry.host.faults import fault_point
from pageferry.memory.regions import SMALL_PAGE
from pageferry.migration.native import off_loop
from pageferry.workloads.holding import Hold

FIRST = (16 << 20) // SMALL_PAGE
"""Pages of the first part; each one has twice as many as the one before..."""
MOST = 16
"""...up to one part in so many of the whole."""

Part = tuple[int, int, int]
"""(number of the region, first page, pages)"""


async def send_as_it_comes(
    hold: Hold, sender: BlockSender, mappings: Sequence[Mapping], pages: Sequence[PageSet], number: int
) -> None:
    """Send these pages (one set per region) as round `number`, while others are still being brought.

    Raises what `BlockSender.send` does; RestoreError, ImageError when contents cannot be had.
    """
    none = [PageSet(region.pages) for region in pages]
    bringing: asyncio.Task[None] | None = None
    found = [part for part in parts([region.pages for region in pages]) if _of(pages, part)]
    try:
        for part, following in zip(found, [*found[1:], None], strict=True):
            await (bringing or _bring(hold, part))
            bringing = asyncio.create_task(_bring(hold, following)) if following is not None else None
            sets = [*none[: part[0]], _of(pages, part), *none[part[0] + 1 :]]
            await off_loop(partial(sender.send, mappings, sets, number, barrier=False), cancel=sender.cancel)
            fault_point("source.part-sent")
    finally:
        if bringing is not None:
            bringing.cancel()
            await asyncio.gather(bringing, return_exceptions=True)
    await off_loop(partial(sender.send, mappings, none, number), cancel=sender.cancel)


def part_of(region: PageSet, first: int, count: int) -> PageSet:
    """The pages of a set that are among `count` from `first` on, or up to the end of the region."""
    part = region.copy()
    part.remove(0, first)
    part.remove(min(first + count, region.pages), region.pages)
    return part


def parts(regions: Sequence[int]) -> Iterator[Part]:
    """Regions of so many pages, cut into parts."""
    size, most = FIRST, max(FIRST, sum(regions) // MOST)
    for region, pages in enumerate(regions):
        first = 0
        while first < pages:
            count = min(size, pages - first)
            yield region, first, count
            first += count
            size = min(size * 2, most)


async def bring_rest(hold: Hold, regions: Sequence[int]) -> None:
    """Have all pages of regions of so many pages in memory, for who sends them when the workload runs elsewhere."""
    for part in parts(regions):
        await _bring(hold, part)


def _of(pages: Sequence[PageSet], part: Part) -> PageSet:
    """Those pages of a part that are in the sets."""
    region, first, count = part
    return part_of(pages[region], first, count)


async def _bring(hold: Hold, part: Part) -> None:
    await off_loop(partial(hold.ensure, *part), cancel=hold.cancel)
