"""Options of the verbs that start a guest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """Options of `run`, `receive` and `restore`."""

    detach: bool = False
    """Return when the guest runs, and write its output to a log."""
    hugetlb: bool = False
    """Place guest memory in reserved 2 MiB pages (hugetlbfs)."""
