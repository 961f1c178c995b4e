"""Sharing policy: which huge pages to split, and how fast to scan.

Its inputs are the numbers of shareable pages, the available memory, and the hot huge pages if they are known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pageferry.sharing.scan import Unit

PLENTY, SCARCE = 0.5, 0.1
"""Available fractions of memory between which the threshold varies. At `PLENTY`, only the best huge pages are split; at
`SCARCE`, almost any."""
MAX_THRESHOLD, MIN_THRESHOLD = 256, 16
"""Thresholds at `PLENTY` and `SCARCE`: shareable base pages, of 512."""
MIN_SHAREABLE = 8
"""Minimum number of shareable pages of a unit that is not backed by a huge page: sharing costs two mappings."""


def threshold(free: float) -> int:
    """Return the minimum number of shareable pages for which a huge page is split. `free`: available fraction of
    memory. The number is linear in `free` between `SCARCE` and `PLENTY`."""
    part = (min(max(free, SCARCE), PLENTY) - SCARCE) / (PLENTY - SCARCE)
    return round(MIN_THRESHOLD + part * (MAX_THRESHOLD - MIN_THRESHOLD))


def best_first(units: Iterable[Unit], *, possible: bool) -> list[Unit]:
    """Return the units with shareable pages: units of base pages first, then huge pages, each by decreasing number of
    these pages. `possible`: count only pages that can be shared on this host."""

    def count(unit: Unit) -> int:
        return unit.possible if possible else unit.shareable

    return sorted((unit for unit in units if count(unit)), key=lambda unit: (unit.large, -count(unit)))


def choose(
    units: Sequence[Unit], least: int, hot: Collection[tuple[int, int]] = frozenset(), most: int | None = None
) -> list[Unit]:
    """Choose the units to share in: units of base pages, and huge pages that are not hot and have at least `least`
    pages that can be shared on this host.

    `hot`: huge pages in use, as (index of the workload, start). `most`: maximum number of huge pages to split.
    """
    chosen = []
    broken = 0
    for unit in best_first(units, possible=True):
        if not unit.large:
            if unit.possible >= MIN_SHAREABLE:
                chosen.append(unit)
        elif unit.possible >= least and (unit.place.workload, unit.start) not in hot and broken != most:
            chosen.append(unit)
            broken += 1
    return chosen


@dataclass(slots=True)
class Pace:
    """CPU budget of repeated scans, by the available memory; hysteresis avoids frequent changes."""

    LOW, HIGH = 0.15, 0.25
    HURRIED, RELAXED = 0.5, 0.02
    hurried: bool = False

    def budget(self, free: float) -> float:
        """Return the fraction of a CPU: `HURRIED` below `LOW` available memory, `RELAXED` above `HIGH`, otherwise the
        previous fraction."""
        if free < self.LOW:
            self.hurried = True
        elif free > self.HIGH:
            self.hurried = False
        return self.HURRIED if self.hurried else self.RELAXED
