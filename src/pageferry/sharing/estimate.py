"""Estimates of the memory that sharing could free, and of the number of huge pages to split for it."""

from __future__ import annotations

from collections.abc import Sequence

from pageferry.memory.regions import SMALL_PAGE
from pageferry.sharing import ksm, policy
from pageferry.sharing.events import Class, Point, ScanReport, SharingResult
from pageferry.sharing.scan import CLASSES, Findings, Place, Unit

POINTS = 64
"""Maximum number of points of a curve."""


def freed_by(findings: Findings, units: Sequence[Unit], *, possible: bool = True) -> list[int]:
    """Return the number of bytes freed by sharing in the first 1, 2, 3... units. `possible`: whether to count only
    contents that can be shared on this host."""
    order = [unit.number for unit in units]
    pages_per_copy = ksm.pages_per_copy() if possible else _UNLIMITED
    return [pages * SMALL_PAGE for pages in findings.engine.curve(order, pages_per_copy, possible=possible)]


_UNLIMITED = (1 << 32) - 1


def result(findings: Findings, threshold: int) -> SharingResult:
    """Return the result of a scan, with the estimate."""
    everything = policy.best_first(findings.units, possible=False)
    possible = policy.best_first(findings.units, possible=True)
    reclaimable = sum(findings.freed.values()) * SMALL_PAGE
    possible_curve = _by_large_pages(possible, freed_by(findings, possible))
    return SharingResult(
        workloads=[target.name for target in findings.targets],
        memory=sum(unit.present + unit.shared for unit in findings.units) * SMALL_PAGE,
        large_pages=sum(unit.large for unit in findings.units),
        already_shared=sum(unit.shared for unit in findings.units) * SMALL_PAGE,
        reclaimable=reclaimable,
        possible=possible_curve[-1],
        classes={
            name: Class(pages=findings.pages[name], reclaimable=findings.freed[name] * SMALL_PAGE) for name in CLASSES
        },
        curve=_curve(_by_large_pages(everything, freed_by(findings, everything, possible=False)), possible_curve),
        scan=ScanReport(findings.scanned, findings.seconds * 1e3, findings.every, findings.scale),
        threshold=threshold,
        not_shareable=_limits(findings),
        deferred=sum(unit.deferred for unit in findings.units) * SMALL_PAGE,
    )


def _by_large_pages(units: Sequence[Unit], freed: Sequence[int]) -> list[int]:
    """Return the number of bytes freed with 0, 1, 2... huge pages split. In `units`, units of base pages precede huge
    pages."""
    small = sum(not unit.large for unit in units)
    return [freed[small - 1] if small else 0, *freed[small:]]


def _curve(reclaimable: Sequence[int], possible: Sequence[int]) -> list[Point]:
    last = max(len(reclaimable), len(possible)) - 1
    numbers = sorted({round(last * step / (POINTS - 1)) for step in range(POINTS)})

    def at(curve: Sequence[int], number: int) -> int:
        return curve[min(number, len(curve) - 1)]

    return [Point(number, at(reclaimable, number), at(possible, number)) for number in numbers]


def _limits(findings: Findings) -> list[str]:
    limits = []
    shared = [place for place in findings.places if not place.anonymous]
    if shared:
        limits.append("only zero pages of shared files can be freed: KSM merges private memory only")
    if any(_is_arena(place) for place in shared):
        limits.append(
            "cold duplicate pages of an arena can be stored once: `pageferry large-pages NAME --reclaim store`"
        )
    if any(place.deferred is not None and not place.deferred.known for place in shared):
        limits.append("memory in a cold store, or deferred from another host, is not scanned")
    if any(place.target.workload is None for place in shared):
        limits.append("shared files of an unmanaged process stay unchanged: the process cannot be paused")
    if any(place.region is not None and place.target.regions[place.region].page_size > SMALL_PAGE for place in shared):
        limits.append("pages of hugetlbfs cannot be split")
    return limits + [reason for target in findings.targets for reason in target.skipped]


def _is_arena(place: Place) -> bool:
    workload = place.target.workload
    return workload is not None and workload.identity.kind == "arena"
