"""Facts and figures: what a report has to say, whether it is drawn, printed or read by a program."""

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
"""How a value of a unit is written."""


def shown(value: Cell, unit: Unit) -> str:
    """A value as people read it."""
    return "–" if value is None else FORMS[unit](value)


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a run comes down to."""

    name: str
    value: Cell
    unit: Unit = "text"
    lead: bool = False
    """Whether it is one of the few that are shown large."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, and the table of what it shows."""

    name: str
    """For programs: the same in every run that has it."""
    title: str
    caption: str
    """How to read it, in a sentence or two."""
    svg: str
    columns: Sequence[tuple[str, Unit]]
    rows: Sequence[Sequence[Cell]]
    legend: Sequence[tuple[int, str]] = field(default_factory=tuple)
    """Colours of the palette and what they stand for."""


def time_axis(most: float) -> Callable[[float], str]:
    """How seconds are written on an axis that reaches to `most`: all in one unit."""
    factor, unit = (1.0, "s") if most >= 1 else (1e3, "ms")
    return lambda value: f"{value * factor:g} {unit}" if value else "0"


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly spread, the last one among them."""
    if len(rows) <= most:
        return list(rows)
    last = len(rows) - 1
    return [rows[number] for number in sorted({round(last * step / (most - 1)) for step in range(most)})]
