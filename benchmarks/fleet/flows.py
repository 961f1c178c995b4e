"""Transfers that share links fairly (max-min fairness), as TCP connections of equal distance do approximately.

A transfer has a maximum rate and a path of links. The rates are computed again whenever a transfer begins or ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

MAX_LINKS = 6
"""Maximum number of links of a path."""
DONE = 0.5
"""Number of bytes below which a transfer has ended."""


class Flows:
    """Running transfers. `rates`: rate of each link, bytes per second."""

    def __init__(self, rates: Sequence[float]) -> None:
        unlimited = len(rates)
        # The last link is unlimited: shorter paths are filled up with it.
        self.links = np.append(np.asarray(rates, dtype=float), inf)
        self._unlimited = unlimited
        self.peak = np.zeros(len(self.links))
        """Highest load of each link, bytes per second."""
        self.carried = 0.0
        """Bytes of all transfers."""
        size = 64
        self._paths = np.full((size, MAX_LINKS), unlimited)
        self._limit = np.zeros(size)
        self._left = np.full(size, inf)
        self._rate = np.zeros(size)
        self._keys: list[str | None] = [None] * size
        self._free = list(range(size))
        self._slots: dict[str, int] = {}
        self._changed = False

    def add(self, key: str, path: Sequence[int], limit: float, size: float) -> None:
        """Begin a transfer of `size` bytes, or continue a transfer with `size` further bytes."""
        if key not in self._slots:
            if not self._free:
                self._grow()
            slot = self._free.pop()
            self._slots[key], self._keys[slot] = slot, key
            self._paths[slot] = self._unlimited
            self._paths[slot, : len(path)] = path
            self._limit[slot] = limit
            self._rate[slot] = 0.0
            self._changed = True
        self._left[self._slots[key]] = max(size, DONE)

    def remove(self, key: str) -> None:
        """End a transfer. Does nothing if there is no such transfer."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._keys[slot] = None
            self._left[slot], self._rate[slot] = inf, 0.0
            self._paths[slot] = self._unlimited
            self._free.append(slot)
            self._changed = True

    def rate_of(self, key: str) -> float:
        """Return the current rate of a transfer, bytes per second."""
        self._share()
        return float(self._rate[self._slots[key]])

    def next_end(self) -> float:
        """Return the time until the next transfer ends, seconds; infinite without transfers."""
        self._share()
        with np.errstate(divide="ignore", invalid="ignore"):
            times = np.where(self._rate > 0, self._left / self._rate, inf)
        return float(times.min())

    def advance(self, seconds: float) -> list[str]:
        """Let time pass, and return the transfers that have ended. They continue to exist until `remove`."""
        self._share()
        self.carried += float(self._rate.sum()) * seconds
        self._left -= self._rate * seconds
        ended = np.nonzero(self._left <= DONE)[0]
        found = [key for slot in ended if (key := self._keys[slot]) is not None]
        self._left[ended] = inf
        return found

    def cut(self, link: int, rate: float) -> None:
        """Change the rate of a link."""
        self.links[link] = rate
        self._changed = True

    def _grow(self) -> None:
        size = len(self._limit)
        self._paths = np.vstack([self._paths, np.full((size, MAX_LINKS), self._unlimited)])
        self._limit = np.append(self._limit, np.zeros(size))
        self._left = np.append(self._left, np.full(size, inf))
        self._rate = np.append(self._rate, np.zeros(size))
        self._keys += [None] * size
        self._free += list(range(size, 2 * size))

    def _share(self) -> None:
        """Compute the rates.

        In each step, a transfer gets its share if this is its own limit, or the lowest share on all of its links. The
        shares of the others can then only increase.
        """
        if not self._changed:
            return
        self._changed = False
        waiting = np.fromiter(self._slots.values(), dtype=np.intp, count=len(self._slots))
        # Only the links in use are considered, under numbers from 0; the last one is the unlimited link.
        used, numbers = np.unique(np.append(self._paths[waiting], self._unlimited), return_inverse=True)
        paths = numbers[:-1].reshape(len(waiting), MAX_LINKS)
        free, load = self.links[used].copy(), np.zeros(len(used))
        while len(waiting):
            users = np.bincount(paths.ravel(), minlength=len(free))
            limit = self._limit[waiting]
            share = np.minimum(limit, (free / np.maximum(users, 1))[paths].min(axis=1))
            lowest = np.full(len(free), inf)
            np.minimum.at(lowest, paths.ravel(), np.repeat(share, MAX_LINKS))
            lowest[-1] = inf
            fixed = (share == limit) | (share <= lowest[paths].min(axis=1) * (1 + 1e-9))
            self._rate[waiting[fixed]] = share[fixed]
            taken = _sum_by_link(paths[fixed], share[fixed], len(free))
            load += taken
            free = np.maximum(free - taken, 0.0)
            waiting, paths = waiting[~fixed], paths[~fixed]
        self.peak[used] = np.maximum(self.peak[used], load)


def _sum_by_link(paths: NDArray[np.intp], rates: NDArray[np.float64], links: int) -> NDArray[np.float64]:
    found = np.zeros(links)
    np.add.at(found, paths.ravel(), np.repeat(rates, MAX_LINKS))
    found[-1] = 0.0
    return found
