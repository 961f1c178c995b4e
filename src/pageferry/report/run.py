"""Run of a command in a report: its log, outcome, facts and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pageferry.errors import UsageError
from pageferry.host.processes import signal_name
from pageferry.report.event_log import Log
from pageferry.report.events import FactRecord, FigureRecord, Outcome, RunRecord
from pageferry.report.figures import checkpoint, large_pages, migration, restore, sharing
from pageferry.report.figures.base import Cell, Fact, Figure

KINDS = (migration, checkpoint, restore, large_pages, sharing)
NAMES = ("name", "target", "names", "image")
"""Names of the arguments that contain the subject of a verb. The first that is present is used."""


@dataclass(frozen=True, slots=True)
class Run:
    """Log of a command, with its facts and figures."""

    log: Log
    facts: list[Fact]
    figures: list[Figure]

    @classmethod
    def of(cls, log: Log) -> Run:
        """Return the run of a log. Raises UsageError if its events contradict each other."""
        try:
            facts = [fact for kind in KINDS for fact in kind.facts(log)]
            return cls(log, facts, [figure for kind in KINDS for figure in kind.figures(log)])
        except (ArithmeticError, LookupError, TypeError, ValueError) as wrong:
            # The types of all fields have been checked. Numbers that contradict each other cause these exceptions.
            raise UsageError(f"cannot report {log.path}: its events are inconsistent ({wrong})") from wrong

    @property
    def subject(self) -> str:
        """Workload, process or image on which the command operated; empty if there is none."""
        given: Any = next(
            (self.log.header.arguments.get(name) for name in NAMES if self.log.header.arguments.get(name)), ""
        )
        return ", ".join(map(str, given)) if isinstance(given, list) else str(given)

    @property
    def title(self) -> str:
        """Verb and subject, such as `migrate web`."""
        return f"{self.log.header.verb} {self.subject}".strip()

    @property
    def outcome(self) -> Outcome:
        """Outcome of the command."""
        end = self.log.end
        if end is None:
            return "unfinished"
        if end.exit_code > 128:
            return "interrupted"
        return "failed" if end.exit_code else "done"

    @property
    def message(self) -> str | None:
        """Reason why the command failed, or why its log has no end line; None if it succeeded."""
        end = self.log.end
        if end is None:
            return "The log has no end line: the command was killed or is still running."
        if not end.exit_code:
            return None
        if self.outcome == "interrupted":
            return f"Ended by {signal_name(end.exit_code - 128)}."
        named = f"{end.error}: {end.message}" if end.message else end.error or ""
        return f"{named} (exit code {end.exit_code})".strip()

    @property
    def took(self) -> float:
        """Duration from the first to the last line of the log, ms."""
        lines = self.log.lines
        if self.log.ended_at is not None:
            return self.log.ended_at
        return lines[-1].at if lines else 0.0

    def record(self) -> RunRecord:
        """Return the run for JSON output."""
        header, end = self.log.header, self.log.end
        return RunRecord(
            path=str(self.log.path),
            verb=header.verb,
            subject=self.subject,
            started=header.started,
            outcome=self.outcome,
            exit_code=end.exit_code if end is not None else None,
            message=self.message,
            duration_ms=self.took,
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


def families(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the groups of two or more runs of the same verb, in the order of `runs`. `demo` counts as `migrate`."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        verb = run.log.header.verb
        found.setdefault("migrate" if verb == "demo" else verb, []).append(run)
    return [family for family in found.values() if len(family) > 1]


def side_by_side(runs: Sequence[Run]) -> list[tuple[Fact, list[Cell]]]:
    """Return the facts that at least two runs have, in the order of their first appearance, each with its value in
    every run (None: no value)."""
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
