"""Medians and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

__all__ = ["having", "median", "median_of", "spread", "values"]


def values(runs: Sequence[dict[str, Any]], key: str) -> list[float]:
    """What each run has for a key; None and missing left out."""
    return [float(run[key]) for run in runs if run.get(key) is not None]


def median_of(runs: Sequence[dict[str, Any]], key: str) -> float:
    """The median of `values`."""
    return median(values(runs, key))


def having(runs: Sequence[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    """The runs whose keys have these values."""
    return [run for run in runs if all(run[key] == value for key, value in wanted.items())]


def spread(numbers: Sequence[float], digits: int = 0) -> str:
    """`median (least-most)`."""
    if not numbers:
        return "-"
    least, most = (f"{number:,.{digits}f}" for number in (min(numbers), max(numbers)))
    return f"{median(numbers):,.{digits}f} ({least}–{most})"
