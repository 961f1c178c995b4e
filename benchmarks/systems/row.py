"""Row of the table of the ten systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.harness import tables


@dataclass(frozen=True, slots=True)
class Row:
    """Measured figure of a system."""

    system: str
    """Number of the system, S1 to S10."""
    exercised: str
    figure: str
    """Name and unit of the figure."""
    without: float | None
    mechanism: float | None
    """Figure with the mechanism, measured like `without` if the mechanism is disabled; None if not measured."""
    target: str
    """Target in words, as in docs/benchmarks.md."""
    reached: bool
    peer: float | None = None
    whose: str = ""
    """Name of the program with which `peer` was measured."""

    @classmethod
    def unmeasured(cls, system: str, exercised: str, why: BaseException) -> Row:
        """Return the row of a figure that could not be measured, with the reason."""
        words = " ".join(str(why).split()).replace("|", "/") or "no error message"
        return cls(system, exercised, f"not measured, {type(why).__name__}: {words}", None, None, "", False)


@dataclass(frozen=True, slots=True)
class Switches:
    """Systems whose mechanisms are disabled, to check that their rows fail."""

    off: frozenset[str]

    def choose(self, system: str, mechanism: str, without: str) -> str:
        """Return `without` if the mechanism of the system is disabled, otherwise `mechanism`."""
        return without if system in self.off else mechanism


Show = Callable[..., list[Row]]
HEADINGS = ("", "workload", "figure", "without", "with", "peer", "target", "")


def render(rows: Sequence[Row]) -> str:
    """Return the table, in the order of the systems."""
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
