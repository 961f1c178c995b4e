"""Human-readable output of `pageferry report`: facts, and a table with bars for each figure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageferry.report.events import ReportResult
from pageferry.report.figures.base import Figure, shown, thinned
from pageferry.report.run import Run, families, side_by_side
from pageferry.report.text import PlainView
from pageferry.report.units import duration

BAR = 24
"""Width of the longest bar, columns."""
MAX_ROWS = 12
"""Maximum number of rows of a figure."""
STYLES = {"done": "bold green", "failed": "bold red", "interrupted": "bold yellow", "unfinished": "bold yellow"}


class RunsView(PlainView):
    """View of runs. It ignores the result record, which is for JSON output."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    def result(self, result: msgspec.Struct) -> RenderableType:
        """Return all runs in order, and a comparison of runs of the same verb."""
        if not isinstance(result, ReportResult):
            return super().result(result)
        parts: list[RenderableType] = []
        for run in self._runs:
            parts += [_head(run), _facts(run), *(part for figure in run.figures for part in _figure(figure)), Text()]
        for family in families(self._runs):
            parts += [Text("Side by side", style="bold underline"), _comparison(family), Text()]
        if result.html is not None:
            parts.append(Text(f"written: {result.html}"))
        return Group(*parts)


def _head(run: Run) -> RenderableType:
    header = run.log.header
    lines: list[RenderableType] = [
        Text(run.title, style="bold underline"),
        Text.assemble(
            (run.outcome, STYLES[run.outcome]),
            f" after {duration(run.took / 1e3)}; started {header.started} on "
            f"{header.host}, Linux {header.kernel}, pageferry {header.pageferry}",
        ),
    ]
    if run.message:
        lines.append(Text(run.message, style=STYLES[run.outcome]))
    return Group(*lines)


def _facts(run: Run) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for fact in run.facts:
        if fact.value is not None:
            value = shown(fact.value, fact.unit)
            table.add_row(Text(fact.name, style="bold" if fact.lead else ""), Text(value), Text(fact.note, style="dim"))
    return table


def _figure(figure: Figure) -> list[RenderableType]:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    barred = next((number for number, (_, unit) in enumerate(figure.columns) if number and unit != "text"), None)
    for name, unit in figure.columns:
        table.add_column(name, justify="left" if unit == "text" else "right", overflow="fold")
    table.add_column("")
    numbers = [float(row[barred] or 0) for row in figure.rows] if barred is not None else []
    most = max(numbers, default=0) or 1
    for row, number in zip(thinned(figure.rows, MAX_ROWS), thinned(numbers, MAX_ROWS), strict=False):
        cells = [Text(shown(value, unit)) for value, (_, unit) in zip(row, figure.columns, strict=True)]
        table.add_row(*cells, Text("█" * round(BAR * number / most), style="cyan"))
    more = f" ({MAX_ROWS} of {len(figure.rows)} rows)" if len(figure.rows) > MAX_ROWS else ""
    return [Text(), Text(f"{figure.title}{more}", style="bold"), table]


def _comparison(runs: Sequence[Run]) -> RenderableType:
    table = Table("", box=None, pad_edge=False)
    for run in runs:
        table.add_column(Text(f"{run.title}\n{run.log.path.name}"))
    table.add_row("outcome", *(Text(run.outcome, style=STYLES[run.outcome]) for run in runs))
    for fact, values in side_by_side(runs):
        table.add_row(fact.name, *(shown(value, fact.unit) for value in values))
    return table
