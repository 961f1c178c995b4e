"""Options of the built-in workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pageferry.options import Count, Duration, Fraction, Size, check
from pageferry.workloads.arena.limits import MAX_ARENA


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Options of the built-in workload. Raises UsageError."""

    size: Annotated[int, Size(1, MAX_ARENA), "workload"] = 512 << 20
    """Size of the memory of the workload."""
    rate: Annotated[int, Size(0, 1 << 50), "workload"] = 20 << 20
    """Bytes written per second."""
    working_set: Annotated[float, Fraction(), "workload"] = 0.3
    """Fraction of the memory that is written to."""
    zeros: Annotated[float, Fraction(zero=True), "workload"] = 0.2
    """Fraction of the writes that fill a page with zeros."""
    threads: Annotated[int, Count(1, 4096), "workload"] = 2
    """Number of writer threads."""
    processes: Annotated[int, Count(1, 4096), "workload"] = 1
    """Number of processes, over which the threads are distributed."""
    seconds: Annotated[float, Duration(0.0, 3600.0), "workload"] = 1.0
    """Time to write before and after the migration."""

    def __post_init__(self) -> None:
        check(self)
