"""Which large pages to look at next, so many that the overhead stays within its budget."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Literal

from pageferry.large_pages.sampler import LargePage
from pageferry.memory.regions import LARGE_PAGE

FIRST_GUESS = {"shared": 40e-6, "anon": 700e-6}
"""Seconds of CPU per sampled page before anything has been measured: splitting, reading, restoring."""
Limit = Literal["budget", "mappings"]

MOST = 8192
"""Pages at a time: each of them is a mapping of its own for the window, and a process may have 65,530 of those."""


class Sampling:
    """A random sample per round, without repetition until every page has had its turn.

    `fraction` of all pages at most, and no more than what `budget` (of one CPU; None: any) allows at the cost per page
    that rounds so far have had.
    """

    def __init__(self, fraction: float, budget: float | None, seed: int | None = None) -> None:
        self._fraction = fraction
        self._budget = budget
        self._random = random.Random(seed)
        self._seen: set[LargePage] = set()
        self._cost: float | None = None
        self.limited_by: Limit | None = None
        """What made a round smaller than `fraction` asks for."""

    def choose(self, candidates: Sequence[LargePage], seconds: float) -> list[LargePage]:
        """The pages of the next round, which takes about so many seconds; none when every page has been looked at."""
        left = [page for page in candidates if page not in self._seen]
        if not left:
            return []
        self._random.shuffle(left)
        wanted = min(math.ceil(self._fraction * len(candidates)), len(left))
        affordable = self._affordable(left[0], seconds)
        if affordable < min(wanted, MOST):
            self.limited_by = "budget"
        elif wanted > MOST:
            self.limited_by = self.limited_by or "mappings"
        count = min(wanted, affordable, MOST)
        return self._apart(left, count)

    def account(self, pages: Iterable[LargePage], cpu: float) -> None:
        """A round over these pages took so many seconds of CPU."""
        looked_at = list(pages)
        self._seen.update(looked_at)
        cost = cpu / max(len(looked_at), 1)
        self._cost = cost if self._cost is None else (self._cost + cost) / 2

    def _affordable(self, page: LargePage, seconds: float) -> int:
        if self._budget is None:
            return MOST
        cost = FIRST_GUESS[page.area.kind] if self._cost is None else self._cost
        return max(1, int(self._budget * seconds / max(cost, 1e-6)))

    @staticmethod
    def _apart(pages: list[LargePage], count: int) -> list[LargePage]:
        """The first `count` pages of which, in private memory, no two are adjacent: they would become one mapping."""
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
