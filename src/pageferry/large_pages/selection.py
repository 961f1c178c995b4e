"""Choice of the huge pages to sample, limited by a CPU budget."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Literal

from pageferry.large_pages.sampler import LargePage
from pageferry.memory.regions import LARGE_PAGE

FIRST_GUESS = {"shared": 40e-6, "anon": 700e-6}
"""Assumed CPU time per sampled page (split, read, restore) before the first measurement, seconds."""
Limit = Literal["budget", "mappings"]

MAX_PAGES = 8192
"""Maximum number of pages per round. Each is a separate mapping during the window, and a process can have 65,530
mappings."""


class Sampling:
    """Random samples, one per round, without repetition.

    A round has at most `fraction` of all pages, and at most as many as `budget` allows at the cost per page measured so
    far. `budget`: fraction of one CPU; None for no limit.
    """

    def __init__(self, fraction: float, budget: float | None, seed: int | None = None) -> None:
        self._fraction = fraction
        self._budget = budget
        self._random = random.Random(seed)
        self._seen: set[LargePage] = set()
        self._cost: float | None = None
        self.limited_by: Limit | None = None
        """Limit that has made a round smaller than `fraction` allows; None if no round was smaller."""

    def choose(self, candidates: Sequence[LargePage], seconds: float) -> list[LargePage]:
        """Return the pages of the next round, which takes about `seconds`; an empty list if all have been sampled."""
        left = [page for page in candidates if page not in self._seen]
        if not left:
            return []
        self._random.shuffle(left)
        wanted = min(math.ceil(self._fraction * len(candidates)), len(left))
        affordable = self._affordable(left[0], seconds)
        if affordable < min(wanted, MAX_PAGES):
            self.limited_by = "budget"
        elif wanted > MAX_PAGES:
            self.limited_by = self.limited_by or "mappings"
        count = min(wanted, affordable, MAX_PAGES)
        return self._apart(left, count)

    def account(self, pages: Iterable[LargePage], cpu: float) -> None:
        """Record that a round over these pages took `cpu` seconds of CPU time."""
        sampled = list(pages)
        self._seen.update(sampled)
        cost = cpu / max(len(sampled), 1)
        self._cost = cost if self._cost is None else (self._cost + cost) / 2

    def _affordable(self, page: LargePage, seconds: float) -> int:
        if self._budget is None:
            return MAX_PAGES
        cost = FIRST_GUESS[page.area.kind] if self._cost is None else self._cost
        return max(1, int(self._budget * seconds / max(cost, 1e-6)))

    @staticmethod
    def _apart(pages: list[LargePage], count: int) -> list[LargePage]:
        """Return the first `count` pages. Skip neighbours in private memory, because the kernel would merge their
        mappings."""
        chosen: list[LargePage] = []
        taken: set[tuple[int, int]] = set()
        for page in pages:
            if len(chosen) == count:
                break
            pid, address = page.area.pid, page.address
            if page.area.kind == "anon" and taken & {(pid, address - LARGE_PAGE), (pid, address + LARGE_PAGE)}:
                continue
            taken.add((pid, address))
            chosen.append(page)
        return chosen
