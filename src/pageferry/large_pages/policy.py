"""What becomes of a large page, given what is known of it. Small, and meant to be replaced: any `Policy` will do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from pageferry import values

Decision = Literal["break", "keep", "restore"]
"""`break`: its cold small pages are reclaimed. `keep`: it stays as it is. `restore`: it is hot, and gets back what it
had if it was broken before."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a large page."""

    activity: int
    """Distinct small pages accessed in the window, of 512."""
    sharing: int = 0
    """Small pages whose contents also stand elsewhere (S9)."""
    free: float = 1.0
    """Part of the host's memory that is available."""


class Policy(Protocol):
    """Decides about one large page at a time."""

    def decide(self, facts: Facts) -> Decision:
        """What becomes of it."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Breaks pages of low activity, more of them when memory is scarce."""

    activity: int = 64
    """Break a page with at most so many small pages accessed. Twice that when memory is scarce."""
    sharing: int = 256
    """Break a page, while memory is scarce, that could share so many."""
    scarce: float = 0.1
    """Memory is scarce when less than this part of it is available."""

    def __post_init__(self) -> None:
        """Raises UsageError."""
        values.count("threshold", self.activity, 0, 512)
        values.count("sharing", self.sharing, 0, 512)
        values.number("scarce", self.scarce, 0.0, 1.0)

    def decide(self, facts: Facts) -> Decision:
        """Break what is idle; restore what is used in its greater part; leave the rest alone."""
        scarce = facts.free < self.scarce
        if facts.activity <= self.activity * (2 if scarce else 1):
            return "break"
        if scarce and facts.sharing >= self.sharing:
            return "break"
        return "restore" if facts.activity >= 256 else "keep"
