"""A row of the table of the ten systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.measuring import tables


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one system."""

    system: str
    """S1 to S10."""
    exercised: str
    figure: str
    """What is counted, with its unit."""
    without: float | None
    mechanism: float | None
    """The figure with the mechanism; the same way as `without` when it was switched off. None: not measured."""
    target: str
    """In words, as docs/benchmarks.md has it."""
    reached: bool
    peer: float | None = None
    whose: str = ""
    """The peer."""

    @classmethod
    def unmeasured(cls, system: str, exercised: str, why: BaseException) -> Row:
        """What could not be measured, and why."""
        words = " ".join(str(why).split()).replace("|", "/") or "no reason was given"
        return cls(system, exercised, f"not measured, {type(why).__name__}: {words}", None, None, "", False)


@dataclass(frozen=True, slots=True)
class Switches:
    """Which systems are switched off, to see that their rows fail then."""

    off: frozenset[str]

    def choose(self, system: str, mechanism: str, without: str) -> str:
        """The option that is to be measured as the mechanism."""
        return without if system in self.off else mechanism


Show = Callable[..., list[Row]]
HEADINGS = ("", "exercised", "figure", "without", "with", "peer", "target", "")


def render(rows: Sequence[Row]) -> str:
    """The table, in the order of the systems."""
    ordered = sorted(rows, key=lambda row: int(row.system[1:]))
    return tables.rows(HEADINGS, [_cells(row) for row in ordered])


def _cells(row: Row) -> list[str]:
    peer = _number(row.peer) + (f" ({row.whose})" if row.peer is not None else "")
    return [
        row.system,
        row.exercised,
        row.figure,
        _number(row.without),
        _number(row.mechanism),
        peer,
        row.target,
        "pass" if row.reached else "**fail**",
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:,.2f}"
