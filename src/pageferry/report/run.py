"""One run as a report sees it: what was run, how it ended, what it comes down to, and what can be drawn of it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from pageferry.errors import UsageError
from pageferry.events import Event
from pageferry.report.event_log import Log
from pageferry.report.figures import checkpoint, large_pages, migration, restore, sharing
from pageferry.report.figures.base import Cell, Fact, Figure

KINDS = (migration, checkpoint, restore, large_pages, sharing)
NAMES = ("name", "target", "names", "image")
"""Arguments that say what a verb was about, the first that is there."""

Outcome = Literal["done", "failed", "interrupted", "unfinished"]


class FactRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A fact for programs."""

    name: str
    value: float | str | None
    unit: str
    """`bytes`, `bytes/s`, `ms`, `us`, `count`, `part` (of 1) or `text`."""


class FigureRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a figure."""

    name: str
    title: str
    columns: list[tuple[str, str]]
    """(name, unit) of each, units as in facts."""
    rows: list[list[float | str | None]]


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A run for programs."""

    path: str
    verb: str
    subject: str
    """What it was about: a workload, a process, an image."""
    started: str
    outcome: Outcome
    """`unfinished`: killed, or still running."""
    exit_code: int | None
    message: str | None
    took_ms: float
    """Until the last line of the log."""
    facts: list[FactRecord]
    figures: list[FigureRecord]


class ReportResult(Event, frozen=True, kw_only=True, tag="report"):
    """What `pageferry report` says."""

    runs: list[RunRecord]
    html: str | None
    """The page that was written."""


@dataclass(frozen=True, slots=True)
class Run:
    """A log, and what is made of it."""

    log: Log
    facts: list[Fact]
    figures: list[Figure]

    @classmethod
    def of(cls, log: Log) -> Run:
        """Look at everything that a log holds. Raises UsageError where that makes no sense."""
        try:
            facts = [fact for kind in KINDS for fact in kind.facts(log)]
            return cls(log, facts, [figure for kind in KINDS for figure in kind.figures(log)])
        except (ArithmeticError, LookupError, TypeError, ValueError) as wrong:
            # Types have been checked; numbers that contradict each other show here.
            raise UsageError(f"{log.path} holds events that make no sense ({wrong})") from wrong

    @property
    def subject(self) -> str:
        """What it was about."""
        given: Any = next(
            (self.log.header.arguments.get(name) for name in NAMES if self.log.header.arguments.get(name)), ""
        )
        return ", ".join(map(str, given)) if isinstance(given, list) else str(given)

    @property
    def title(self) -> str:
        """`migrate web`."""
        return f"{self.log.header.verb} {self.subject}".strip()

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        end = self.log.end
        if end is None:
            return "unfinished"
        if end.exit_code > 128:
            return "interrupted"
        return "failed" if end.exit_code else "done"

    @property
    def message(self) -> str | None:
        """Why it did not end well."""
        end = self.log.end
        if end is None:
            return "The log has no end: the command was killed, or still runs."
        if not end.exit_code:
            return None
        if self.outcome == "interrupted":
            return f"Ended by {_signal(end.exit_code - 128)}."
        named = f"{end.error}: {end.message}" if end.message else end.error or ""
        return f"{named} (exit code {end.exit_code})".strip()

    @property
    def took(self) -> float:
        """Milliseconds until the last line."""
        lines = self.log.lines
        if self.log.ended_at is not None:
            return self.log.ended_at
        return lines[-1].at if lines else 0.0

    def record(self) -> RunRecord:
        """For programs."""
        header, end = self.log.header, self.log.end
        return RunRecord(
            path=str(self.log.path),
            verb=header.verb,
            subject=self.subject,
            started=header.started,
            outcome=self.outcome,
            exit_code=end.exit_code if end is not None else None,
            message=self.message,
            took_ms=self.took,
            facts=[FactRecord(name=fact.name, value=fact.value, unit=fact.unit) for fact in self.facts],
            figures=[
                FigureRecord(
                    name=figure.name,
                    title=figure.title,
                    columns=[(name, unit) for name, unit in figure.columns],
                    rows=[list(row) for row in figure.rows],
                )
                for figure in self.figures
            ],
        )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def families(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of the same kind, of which there are several, in the order in which they were given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        verb = run.log.header.verb
        found.setdefault("migrate" if verb == "demo" else verb, []).append(run)
    return [family for family in found.values() if len(family) > 1]


def side_by_side(runs: Sequence[Run]) -> list[tuple[Fact, list[Cell]]]:
    """Facts that more than one run has, with the value of each run, in the order of their first appearance."""
    found: dict[tuple[str, str], Fact] = {}
    for run in runs:
        for fact in run.facts:
            found.setdefault((fact.name, fact.unit), fact)
    table = []
    for key, fact in found.items():
        values = [next((one.value for one in run.facts if (one.name, one.unit) == key), None) for run in runs]
        if sum(value is not None for value in values) > 1:
            table.append((fact, values))
    return table
