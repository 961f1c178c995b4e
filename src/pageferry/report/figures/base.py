"""Facts and figures: the contents of a report, independent of its output format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pageferry.report.units import duration, rate, size

Unit = Literal["bytes", "bytes/s", "ms", "us", "count", "part", "text"]
Cell = float | str | None

FORMS: dict[Unit, Callable[[Any], str]] = {
    "bytes": size,
    "bytes/s": rate,
    "ms": lambda value: duration(value / 1e3),
    "us": lambda value: duration(value / 1e6),
    "count": lambda value: f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.1f}",
    "part": lambda value: f"{value:.1%}",
    "text": str,
}
"""Formatters of values, by unit."""


def shown(value: Cell, unit: Unit) -> str:
    """Return the value as text in its unit; a dash for None."""
    return "–" if value is None else FORMS[unit](value)


@dataclass(frozen=True, slots=True)
class Fact:
    """Key figure of a run."""

    name: str
    value: Cell
    unit: Unit = "text"
    lead: bool = False
    """Whether the fact is shown prominently."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """Chart and the table of its values."""

    name: str
    """Identifier of the figure, the same in all runs."""
    title: str
    caption: str
    """Text below the chart, one or two sentences."""
    svg: str
    columns: Sequence[tuple[str, Unit]]
    rows: Sequence[Sequence[Cell]]
    legend: Sequence[tuple[int, str]] = field(default_factory=tuple)
    """Numbers of the colours in the palette, and their meanings."""


def time_axis(most: float) -> Callable[[float], str]:
    """Return a formatter for the ticks of an axis from 0 to `most` seconds. It uses one unit for all ticks."""
    factor, unit = (1.0, "s") if most >= 1 else (1e3, "ms")
    return lambda value: f"{value * factor:g} {unit}" if value else "0"


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """Return up to `most` of the rows, evenly spaced and including the last row."""
    if len(rows) <= most:
        return list(rows)
    last = len(rows) - 1
    return [rows[number] for number in sorted({round(last * step / (most - 1)) for step in range(most)})]
