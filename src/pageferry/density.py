"""Access activity of huge pages (S3) as input for sharing, and duplicate pages (S9) as input for reclaim."""

from __future__ import annotations

from collections.abc import Sequence

from pageferry.events import Listener, ignore
from pageferry.large_pages.api import sample_async
from pageferry.large_pages.events import Sample
from pageferry.large_pages.options import Options
from pageferry.sharing import scan
from pageferry.sharing.options import Options as ScanOptions
from pageferry.workloads.target import Target, open_target_async

HOT = 64
"""Minimum number of base pages accessed in a window for which sharing does not split a huge page."""
SAMPLING = Options(sample=0.25, rounds=4, budget=None)
"""Options to sample every huge page: a quarter of them in each of four rounds."""


async def hot_large_pages(names: Sequence[str], listener: Listener = ignore) -> set[tuple[int, int]]:
    """Return the huge pages in use (see `HOT`), in the form that `sharing.api.share` accepts.

    Raises the same errors as `open_target` and `sample`.
    """
    hot: set[tuple[int, int]] = set()
    for number, name in enumerate(names):
        with await open_target_async(name) as target:
            result = await sample_async(target, SAMPLING, listener=listener)
            hot.update((number, _start(target, one)) for one in result.samples if one.activity >= HOT)
    return hot


async def shareable_pages(target: Target, listener: Listener = ignore) -> dict[tuple[int, int], int]:
    """Count the base pages with a duplicate in the target, per huge page, in the form that `large_pages.api.sample`
    accepts."""
    findings = await scan.look([target], ScanOptions(), listener)
    found: dict[tuple[int, int], int] = {}
    for unit in findings.units:
        area = unit.place.area
        if area is not None:
            found[area.pid, unit.start] = unit.possible
            continue
        for shown in target.areas:
            if shown.region == unit.place.region and shown.offset <= unit.start < shown.offset + shown.length:
                found[shown.pid, shown.address + unit.start - shown.offset] = unit.possible
    return found


def _start(target: Target, found: Sample) -> int:
    """Return the position of the huge page in the sharing scan: its offset in a region, or its address in the
    process."""
    for area in target.areas:
        if area.pid == found.pid and area.address <= found.address < area.end:
            return found.address if area.region is None else area.offset + found.address - area.address
    return found.address
