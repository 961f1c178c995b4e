"""Reclaim policy, which decides about each sampled huge page. Any `Policy` can replace it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from pageferry import values

Decision = Literal["break", "keep", "restore"]
"""Decision about a huge page. `break`: split it, and reclaim its cold base pages. `keep`: leave it unchanged.
`restore`: leave it unchanged because it is hot."""


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
    """Policy that decides about one huge page at a time."""

    def decide(self, facts: Facts) -> Decision:
        """Return the decision about a huge page."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Policy that splits huge pages of low activity, and more of them when memory is scarce."""

    activity: int = 64
    """Maximum number of accessed base pages for which a huge page is split. The maximum is doubled when memory is
    scarce."""
    sharing: int = 256
    """Minimum number of base pages with duplicates for which a huge page is split when memory is scarce."""
    scarce: float = 0.1
    """Available fraction of memory below which memory is scarce."""

    def __post_init__(self) -> None:
        """Raise UsageError if a value is invalid."""
        values.count("threshold", self.activity, 0, 512)
        values.count("sharing", self.sharing, 0, 512)
        values.number("scarce", self.scarce, 0.0, 1.0)

    def decide(self, facts: Facts) -> Decision:
        """Return `break` for a page within the thresholds, `restore` if at least half of the page was accessed,
        otherwise `keep`."""
        scarce = facts.free < self.scarce
        if facts.activity <= self.activity * (2 if scarce else 1):
            return "break"
        if scarce and facts.sharing >= self.sharing:
            return "break"
        return "restore" if facts.activity >= 256 else "keep"
