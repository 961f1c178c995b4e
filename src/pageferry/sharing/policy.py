"""Which large pages to break, and how fast to look: small rules that one can read and replace.

Inputs are counts of shareable pages, the memory that is free, and (if somebody knows) which large pages are hot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pageferry.sharing.scan import Unit

PLENTY, SCARCE = 0.5, 0.1
"""Parts of the machine's memory that are free. At `PLENTY` only the best is worth a large page, at `SCARCE` nearly
anything."""
MOST, LEAST = 256, 16
"""Thresholds that go with them: shareable small pages of the 512 of a large page."""
LEAST_SMALL = 8
"""Shareable pages that make a unit worth two more mappings where there is no large page to break."""


def threshold(free: float) -> int:
    """Shareable pages from which on a large page is broken, when the part `free` of all memory is available.

    It falls in a straight line with the free memory.
    """
    part = (min(max(free, SCARCE), PLENTY) - SCARCE) / (PLENTY - SCARCE)
    return round(LEAST + part * (MOST - LEAST))


def best_first(units: Iterable[Unit], *, possible: bool) -> list[Unit]:
    """Units worth anything: first those outside of large pages, then large pages by the pages they would give."""

    def count(unit: Unit) -> int:
        return unit.possible if possible else unit.shareable

    return sorted((unit for unit in units if count(unit)), key=lambda unit: (unit.large, -count(unit)))


def choose(
    units: Sequence[Unit], least: int, hot: Collection[tuple[int, int]] = frozenset(), most: int | None = None
) -> list[Unit]:
    """The units to share in: large pages with at least `least` pages that can be shared here, but for hot ones.

    `hot`: (number of the place's workload, start) of large pages that are in use; `most`: large pages to break at most.
    """
    chosen = []
    broken = 0
    for unit in best_first(units, possible=True):
        if not unit.large:
            if unit.possible >= LEAST_SMALL:
                chosen.append(unit)
        elif unit.possible >= least and (unit.place.workload, unit.start) not in hot and broken != most:
            chosen.append(unit)
            broken += 1
    return chosen


@dataclass(slots=True)
class Pace:
    """How fast to look again and again, by the memory that is free, with hysteresis: it does not flutter at an edge."""

    LOW, HIGH = 0.15, 0.25
    HURRIED, RELAXED = 0.5, 0.02
    hurried: bool = False

    def budget(self, free: float) -> float:
        """Part of a CPU: much below `LOW` free memory, little above `HIGH`, and as before in between."""
        if free < self.LOW:
            self.hurried = True
        elif free > self.HIGH:
            self.hurried = False
        return self.HURRIED if self.hurried else self.RELAXED
