"""Figures of duplicate pages: their classes, and the memory that is freed as a function of the number of split huge
pages."""

from __future__ import annotations

from pageferry.report.charts import Axes, Bar, Line, bars, lines
from pageferry.report.event_log import Log
from pageferry.report.figures.base import Fact, Figure, thinned
from pageferry.report.units import duration, rate, size
from pageferry.sharing.events import SharingResult

TITLES = {"zero": "zero", "pattern": "one pattern", "inside": "within workloads", "across": "between workloads"}
MAX_ROWS = 40
"""Maximum number of rows of a table."""


def facts(log: Log) -> list[Fact]:
    """Return the facts of the last result in the log."""
    results = log.of(SharingResult)
    if not results:
        return []
    result = results[-1][1]
    speed = result.scan.scanned / max(result.scan.ms / 1e3, 1e-9)
    facts = [
        Fact("reclaimable", result.reclaimable, "bytes", lead=True, note=f"present: {size(result.memory)}"),
        Fact("possible here", result.possible, "bytes", lead=True),
        Fact("huge pages", result.large_pages, "count", lead=True),
        Fact("already shared", result.already_shared, "bytes"),
        Fact("scanned", result.scan.scanned, "bytes", note=f"in {duration(result.scan.ms / 1e3)}, {rate(speed)}"),
        Fact("threshold", result.threshold, "count", note="shareable of 512 base pages"),
        Fact("workloads", ", ".join(result.workloads)),
    ]
    if result.freed is not None:
        facts.insert(
            0, Fact("freed", result.freed, "bytes", lead=True, note=f"estimate: {size(result.estimated or 0)}")
        )
        facts.append(Fact("huge pages split", result.large_pages_broken, "count"))
    return facts


def figures(log: Log) -> list[Figure]:
    """Return the figures of the last result in the log."""
    results = log.of(SharingResult)
    if not results:
        return []
    result = results[-1][1]
    return [*_curve(result), *_classes(result)]


def _curve(result: SharingResult) -> list[Figure]:
    if len(result.curve) < 2:
        return []
    points = thinned(result.curve, 400)
    every = [(float(one.large_pages), float(one.reclaimable)) for one in points]
    possible = [(float(one.large_pages), float(one.possible)) for one in points]
    return [
        Figure(
            "curve",
            "Memory freed by splitting huge pages",
            "Huge pages with the most duplicates are split first: where the line is steep, a few free much memory; "
            "where it is flat, splitting does not pay off. The value at 0 is freed without splitting any.",
            lines(
                "Memory freed by the number of huge pages split",
                [Line("if all could be shared", 2, every, area=True), Line("possible here", 1, possible)],
                Axes(lambda value: f"{value:,.0f}", size, "huge pages split"),
            ),
            (("huge pages split", "count"), ("if all could be shared", "bytes"), ("possible here", "bytes")),
            thinned([(one.large_pages, one.reclaimable, one.possible) for one in result.curve], MAX_ROWS),
            ((2, "if all could be shared"), (1, "possible here")),
        )
    ]


def _classes(result: SharingResult) -> list[Figure]:
    drawn = [Bar(TITLES.get(name, name), found.reclaimable) for name, found in result.classes.items()]
    return [
        Figure(
            "classes",
            "Duplicates by class",
            "Memory that merging would free: zero pages, pages of one pattern, and duplicates within one workload or "
            "between several.",
            bars("Reclaimable memory by class", drawn, size),
            (("class", "text"), ("pages", "count"), ("reclaimable", "bytes")),
            [(TITLES.get(name, name), found.pages, found.reclaimable) for name, found in result.classes.items()],
            ((1, "reclaimable"),),
        )
    ]
