"""What large pages say to sharing and the other way round: their activity (S3), and their equal pages (S9)."""

from __future__ import annotations

from collections.abc import Sequence

from pageferry.events import Listener, ignore
from pageferry.large_pages.api import Options, sample
from pageferry.large_pages.events import Sample
from pageferry.sharing import scan
from pageferry.workloads.targets import Target, open_target

HOT = 64
"""Small pages accessed in a window that make a large page one to be left whole, though it could be shared in."""
LOOKING = Options(sample=0.25, rounds=4, budget=None)
"""Every large page is looked at, a quarter of them at a time."""


async def hot_large_pages(names: Sequence[str], listener: Listener = ignore) -> set[tuple[int, int]]:
    """Large pages that are in use, as `sharing.api.share` takes them. Raises what `open_target` and `sample` raise."""
    hot: set[tuple[int, int]] = set()
    for number, name in enumerate(names):
        with await open_target(name) as target:
            result = await sample(target, LOOKING, listener=listener)
            hot.update((number, _start(target, one)) for one in result.samples if one.activity >= HOT)
    return hot


async def shareable_pages(target: Target, listener: Listener = ignore) -> dict[tuple[int, int], int]:
    """Small pages with an equal elsewhere in the target, per large page, as `large_pages.api.sample` takes them."""
    findings = await scan.look([target], scan.Options(), listener)
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
    """Where the large page is in what the scan of sharing looks at: in its region, or in its process."""
    for area in target.areas:
        if area.pid == found.pid and area.address <= found.address < area.end:
            return found.address if area.region is None else area.offset + found.address - area.address
    return found.address
