"""Markdown tables of raw results and of targets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.statistics import spread, values

Run = dict[str, Any]
Column = tuple[str, str, int, float]
"""Heading, key, digits after the decimal point, and unit by which values are divided."""


@dataclass(frozen=True, slots=True)
class Target:
    """Measured figure with its target."""

    what: str
    wanted: str
    found: str
    reached: bool

    def __str__(self) -> str:
        return f"{'pass' if self.reached else 'FAIL'}  {self.what}: {self.found} (target: {self.wanted})"


def at_most(what: str, found: float | None, wanted: float, unit: str, digits: int = 1) -> Target:
    """Return a target that is a maximum. `found` None: not measured, which misses the target."""
    text = "-" if found is None else f"{found:,.{digits}f} {unit}".strip()
    return Target(what, f"<= {wanted:,g} {unit}".strip(), text, found is not None and found <= wanted)


def at_least(what: str, found: float | None, wanted: float, unit: str, digits: int = 1) -> Target:
    """Return a target that is a minimum. `found` None: not measured, which misses the target."""
    text = "-" if found is None else f"{found:,.{digits}f} {unit}".strip()
    return Target(what, f">= {wanted:,g} {unit}".strip(), text, found is not None and found >= wanted)


def verdict(targets: Sequence[Target]) -> str:
    """Return a table of all targets, with pass or fail."""
    lines = [(target.what, target.wanted, target.found, "pass" if target.reached else "**fail**") for target in targets]
    return rows(("what", "target", "measured", ""), lines)


def table(runs: Sequence[Run], by: tuple[str, ...], columns: Sequence[Column]) -> str:
    """Return a table of medians and ranges.

    The table has one row per combination of values of the keys `by`, in the order of first occurrence.
    """

    def names(run: Run) -> tuple[str, ...]:
        return tuple(str(run[key]) for key in by)

    order = list(dict.fromkeys(map(names, runs)))
    groups = {name: list(group) for name, group in itertools.groupby(sorted(runs, key=names), names)}
    lines = [(*name, *(_cell(groups[name], column) for column in columns)) for name in order]
    return rows((*by, *(heading for heading, *_ in columns)), lines)


def rows(headings: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table of these cells."""
    headings = list(headings)
    every = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def _cell(runs: Sequence[Run], column: Column) -> str:
    _, key, digits, unit = column
    return spread([value / unit for value in values(runs, key)], digits)
