"""Options of a scan, and of sharing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypedDict

from pageferry.options import API_ONLY, Count, Fraction, Size, check


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a scan. Sizes are in bytes, or strings such as `256M`. Raises UsageError."""

    budget: Annotated[
        float | None, Fraction(64.0, unset="unlimited; with --watch adapted to the available memory"), "scanning"
    ] = None
    """Limit for the scan, as a fraction of one CPU, such as 5% or 0.05."""
    memory: Annotated[int, Size(1 << 20, 1 << 50), "scanning"] = 256 << 20
    """Limit for the memory of the scan itself; contents that exceed it are sampled by their hash."""
    every: Annotated[int, Count(1, 1 << 40), "scanning"] = 1
    """Scan only every Nth unit of 2 MiB. A page whose duplicates are all in skipped units counts as unique."""
    threads: Annotated[int, Count(0, 1024), "scanning"] = 0
    """Number of threads; 0: one per CPU."""

    def __post_init__(self) -> None:
        check(self)


class SelectionArguments(TypedDict, total=False):
    """Keyword arguments of `share` for the fields of `Selection`."""

    threshold: int | None
    max_large_pages: int | None
    merge_with_others: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Huge pages to split, and processes to share with. Raises UsageError."""

    threshold: Annotated[int | None, Count(1, 512), API_ONLY] = None
    """Minimum number of shareable base pages for which a huge page is split; None to derive it from the available
    memory."""
    max_large_pages: Annotated[int | None, Count(0, 1 << 40), API_ONLY] = None
    """Maximum number of huge pages to split; None for no limit."""
    merge_with_others: bool = False
    """Whether memory that other processes have offered to KSM may be merged too."""

    def __post_init__(self) -> None:
        check(self)
