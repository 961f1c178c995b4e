"""Reclaim policy: decides about each sampled huge page. Replaceable by any `Policy`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from pageferry import values

Decision = Literal["break", "keep", "restore"]
"""`break`: split the huge page and reclaim its cold base pages. `keep`: leave it. `restore`: it is hot; make it huge
again if it was split before."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Inputs of a decision about a huge page."""

    activity: int
    """Number of base pages accessed in the window, of 512."""
    sharing: int = 0
    """Number of base pages that have duplicates (S9)."""
    free: float = 1.0
    """Fraction of the host's memory that is available."""


class Policy(Protocol):
    """Decides about one huge page at a time."""

    def decide(self, facts: Facts) -> Decision:
        """Return the decision."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Splits huge pages of low activity, and more of them when memory is scarce."""

    activity: int = 64
    """Split a huge page with at most this many base pages accessed; twice as many when memory is scarce."""
    sharing: int = 256
    """Split a huge page with at least this many base pages to share, when memory is scarce."""
    scarce: float = 0.1
    """Available fraction of memory below which memory is scarce."""

    def __post_init__(self) -> None:
        """Raise UsageError if a value is invalid."""
        values.count("threshold", self.activity, 0, 512)
        values.count("sharing", self.sharing, 0, 512)
        values.number("scarce", self.scarce, 0.0, 1.0)

    def decide(self, facts: Facts) -> Decision:
        """Split a page below the thresholds, restore one of which at least half is accessed, and keep all others."""
        scarce = facts.free < self.scarce
        if facts.activity <= self.activity * (2 if scarce else 1):
            return "break"
        if scarce and facts.sharing >= self.sharing:
            return "break"
        return "restore" if facts.activity >= 256 else "keep"
