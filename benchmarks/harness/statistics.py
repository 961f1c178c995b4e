"""Medians and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

__all__ = ["having", "median", "median_of", "spread", "values"]


def values(runs: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Return the values of a key, except None, in all runs that have the key."""
    return [float(run[key]) for run in runs if run.get(key) is not None]


def median_of(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median of the values of a key, as returned by `values`."""
    return median(values(runs, key))


def having(runs: Sequence[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    """Return the runs that have the given value for each of the given keys."""
    return [run for run in runs if all(run[key] == value for key, value in wanted.items())]


def spread(numbers: Sequence[float], digits: int = 0) -> str:
    """Return a text of the form `median (minimum–maximum)`."""
    if not numbers:
        return "-"
    least, most = (f"{number:,.{digits}f}" for number in (min(numbers), max(numbers)))
    return f"{median(numbers):,.{digits}f} ({least}–{most})"
