"""Room for large pages at the destination, made before the first page comes (S6)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from pageferry._engine import Placer
from pageferry.host.compaction import compact_memory
from pageferry.migration.native import off_loop
from pageferry.workloads.base import SMALL_PAGE, Region

_PATIENCE = 1.0
"""Seconds that a post-copy migration waits for its large pages, while the workload runs at the source; the pager goes
on with what is left."""
_PIECE = 32
"""Large pages allocated at a time: some 10 ms."""


async def compact(regions: Sequence[Region], large: Sequence[Sequence[bool]]) -> None:
    """Have as many large pages free as the source has in use; those of hugetlbfs are reserved already."""
    wanted = sum(sum(units) for region, units in zip(regions, large, strict=True) if region.page_size == SMALL_PAGE)
    await asyncio.to_thread(compact_memory, wanted)


async def allocate(placer: Placer, large: Sequence[Sequence[bool]]) -> None:
    """Allocate all large pages: the kernel clears each, and whoever comes to it first would wait for that."""
    deadline = time.monotonic() + _PATIENCE
    for region, units in enumerate(large):
        chosen = [unit for unit, is_large in enumerate(units) if is_large]
        for start in range(0, len(chosen), _PIECE):
            if time.monotonic() > deadline:
                return
            piece = chosen[start : start + _PIECE]
            await off_loop(lambda: placer.allocate_ahead(region, piece))  # noqa: B023
