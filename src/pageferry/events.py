"""Events and results of operations, as typed records.

Each package defines its records in a module `events`; the Events page of the documentation lists all of them. Fields
can be added at any time. Renaming or removing a field, or changing its meaning, increments `SCHEMA`, so that old logs
are not misread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import msgspec

SCHEMA = 1
"""Version of all events together, recorded in the first line of an event log."""


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", tag_field="type"):
    """Base of events and results; `type` is the kind of a record."""


class Latency(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Histogram of durations, microseconds."""

    bins: list[int]
    """Bin k counts durations from 2^(k-1) us up to, but not including, 2^k us; bin 0 counts those below 1 us."""
    p50_us: float
    """Median, microseconds. Each percentile is the upper end of its bin, or the maximum if that is less."""
    p90_us: float
    p99_us: float
    longest_us: float

    @classmethod
    def of(cls, bins: Sequence[int], longest_us: float) -> Self:
        """Create a record from a histogram and its maximum in microseconds. Trailing empty bins are removed."""
        filled = list(bins)
        while filled and not filled[-1]:
            filled.pop()
        p50, p90, p99 = (percentile(filled, part, longest_us) for part in (0.5, 0.9, 0.99))
        return cls(bins=filled, p50_us=p50, p90_us=p90, p99_us=p99, longest_us=longest_us)


def percentile(bins: Sequence[int], part: float, longest: float) -> float:
    """Return the upper end of the bin that contains the percentile, at most the maximum; 0 if all bins are empty."""
    rank, seen = part * sum(bins), 0
    for power, count in enumerate(bins):
        seen += count
        if count and seen >= rank:
            return min(float(1 << power), longest)
    return 0.0


Listener = Callable[[Event], object]
"""Callback for events. It is called in the thread of the operation, usually that of the event loop, and must not
block."""


def ignore(_: Event) -> None:
    """Discard an event: the default listener."""
