"""Plan of a reclaim to a cold store: huge pages to split, and their cold base pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pageferry._engine import PageSet
from pageferry.host.smaps import spare_mappings
from pageferry.large_pages.sampler import Activity, cold_runs
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE, Segment
from pageferry.memory.view import Memory
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.target import Target

Unit = tuple[int, int]
"""Huge page, as (index of the region, index of its first page in the region)."""


@dataclass(slots=True)
class Plan:
    """Cold pages of the chosen huge pages."""

    cold: dict[Unit, list[tuple[int, int]]]
    """Runs of cold pages, as (first, end) in the region, for each huge page in order."""
    kept: list[PageSet]
    """Cold pages, per region, that stay in memory because they are pinned, or were not present at the time of the copy.
    """
    broken: set[Unit] = field(default_factory=set)
    """Huge pages of which at least one page was evicted."""

    @property
    def units(self) -> list[Unit]:
        """Huge pages, in order."""
        return list(self.cold)

    @property
    def whole(self) -> list[Unit]:
        """Huge pages that were not split."""
        return [unit for unit in self.cold if unit not in self.broken]

    def pages(self, units: Sequence[Unit]) -> dict[int, PageSet]:
        """Return the cold pages of these huge pages, by region."""
        found: dict[int, PageSet] = {}
        for unit in units:
            pages = found.setdefault(unit[0], PageSet(self.kept[unit[0]].pages))
            for start, end in self.cold[unit]:
                pages.insert(start, end)
        return found


def plan(target: Target, memory: Memory, idle: Sequence[Activity]) -> Plan:
    """Select the shared huge pages with cold pages, and return their cold pages as a plan. A split huge page may
    require two more mappings per process. Select at most as many as every process can map (`spare_mappings`)."""
    affordable = min((spare_mappings(pid) // 2 for pid in target.pids), default=0)
    cold: dict[Unit, list[tuple[int, int]]] = {}
    for activity in idle:
        area = activity.page.area
        runs = cold_runs(activity.touched) if activity.touched is not None else []
        if area.region is not None and area.page_size == SMALL_PAGE and runs and len(cold) < affordable:
            first = (area.offset + activity.page.address - area.address) // SMALL_PAGE
            cold[area.region, first] = [(first + start, first + end) for start, end in runs]
    return Plan(dict(sorted(cold.items())), memory.page_sets())


def segments(workload: Migratable, units: Sequence[Unit]) -> list[tuple[Unit, Segment]]:
    """Return every mapping of the huge pages, each with its huge page."""
    return [
        (unit, part)
        for unit in units
        for segment in workload.regions[unit[0]].segments
        for part in segment.within([(unit[1] * SMALL_PAGE, LARGE_PAGE)])
    ]


def joined(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent and overlapping parts, given in order as (start, length), and return them."""
    found: list[tuple[int, int]] = []
    for start, length in parts:
        if found and sum(found[-1]) >= start:
            found[-1] = (found[-1][0], max(sum(found[-1]), start + length) - found[-1][0])
        else:
            found.append((start, length))
    return found
