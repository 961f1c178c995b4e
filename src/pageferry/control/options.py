"""Options of the verbs that control a workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pageferry.options import Count, Duration, check


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownOptions:
    """Options of `shutdown`. Raises UsageError."""

    timeout: Annotated[float, Duration(0.1, 86400.0)] = 60.0
    """Maximum time for the guest to shut down."""
    force: bool = False
    """End the guest as `stop` does if it has not shut down in time, or cannot react."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """Options of `logs`. Raises UsageError."""

    lines: Annotated[int | None, Count(0, 1 << 30, metavar="N", unset="the whole log")] = None
    """Start at the last N lines."""

    def __post_init__(self) -> None:
        check(self)
