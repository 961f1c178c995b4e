"""Options of operations on stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypedDict

from pageferry.options import Duration, check

MIN_GRACE = 600.0
"""Minimum grace period, seconds. It exceeds `contents.CHECK_AFTER` and the time for the creation of a reference."""
MAX_GRACE = 366 * 86400.0


class PushArguments(TypedDict, total=False):
    """Keyword arguments of `push_image` for the fields of `PushOptions`."""

    reupload: bool


class CollectArguments(TypedDict, total=False):
    """Keyword arguments of `collect_garbage` for the fields of `CollectOptions`."""

    grace: float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """Options of `push_image`. Raises UsageError."""

    reupload: bool = False
    """Upload all contents, also those that the store has, because objects of the store are damaged."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """Options of `collect_garbage`. Raises UsageError."""

    grace: Annotated[float, Duration(MIN_GRACE, MAX_GRACE)] = 86400.0
    """Keep an unneeded object for this time before it is marked, and again before it is deleted."""

    def __post_init__(self) -> None:
        check(self)
