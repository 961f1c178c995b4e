"""What commands tell: events on the way, and a result at the end, as records with a name.

Every package has its own, in a module `events`; docs/events.md lists them all. A field may be added at any time; when
one is renamed, removed or takes another meaning, `SCHEMA` grows, so that what was written before is not misread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import msgspec

SCHEMA = 1
"""Version of all events together, as the first line of an event log names it."""


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", tag_field="type"):
    """Base of events and results; `type` tells them apart."""


class Latency(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """How long something took each time it was done, as a histogram, microseconds."""

    bins: list[int]
    """Number k: those that took less than 2^k us, and 2^(k-1) us or more (number 0: less than 1 us)."""
    p50_us: float
    """Half took this long or less; as all percentiles the upper end of a bin, or the longest."""
    p90_us: float
    p99_us: float
    longest_us: float

    @classmethod
    def of(cls, bins: Sequence[int], longest_us: float) -> Self:
        """From a histogram and the longest."""
        filled = list(bins)
        while filled and not filled[-1]:
            filled.pop()
        p50, p90, p99 = (percentile(filled, part, longest_us) for part in (0.5, 0.9, 0.99))
        return cls(bins=filled, p50_us=p50, p90_us=p90, p99_us=p99, longest_us=longest_us)


def percentile(bins: Sequence[int], part: float, longest: float) -> float:
    """The end of the bin within which `part` of all is reached; the longest where that is less; 0 of nothing."""
    wanted, seen = part * sum(bins), 0
    for power, count in enumerate(bins):
        seen += count
        if count and seen >= wanted:
            return min(float(1 << power), longest)
    return 0.0


Listener = Callable[[Event], object]
"""Is called with each event, where the work is done (the event loop, mostly); must not block."""


def ignore(_: Event) -> None:
    """A listener for those who do not want to know."""
