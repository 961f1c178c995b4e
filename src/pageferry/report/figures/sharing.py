"""Equal pages drawn: what they are, and what breaking how many large pages would free."""

from __future__ import annotations

from pageferry.report.charts import Bar, Line, bars, lines
from pageferry.report.event_log import Log
from pageferry.report.figures.base import Fact, Figure, thinned
from pageferry.report.units import duration, rate, size
from pageferry.sharing.events import SharingResult

TITLES = {"zero": "zeros", "pattern": "one pattern", "inside": "equal within", "across": "equal between"}
MOST_ROWS = 40


def facts(log: Log) -> list[Fact]:
    """What it comes down to."""
    results = log.of(SharingResult)
    if not results:
        return []
    result = results[-1][1]
    speed = result.scan.looked_at / max(result.scan.ms / 1e3, 1e-9)
    told = [
        Fact("reclaimable", result.reclaimable, "bytes", lead=True, note=f"in memory: {size(result.memory)}"),
        Fact("possible here", result.possible, "bytes", lead=True),
        Fact("large pages", result.large_pages, "count", lead=True),
        Fact("already shared", result.already_shared, "bytes"),
        Fact("looked at", result.scan.looked_at, "bytes", note=f"in {duration(result.scan.ms / 1e3)}, {rate(speed)}"),
        Fact("worth breaking from", result.threshold, "count", note="of 512 shareable"),
        Fact("workloads", ", ".join(result.workloads)),
    ]
    if result.freed is not None:
        told.insert(0, Fact("freed", result.freed, "bytes", lead=True, note=f"estimate: {size(result.estimated or 0)}"))
        told.append(Fact("large pages broken", result.large_pages_broken, "count"))
    return told


def figures(log: Log) -> list[Figure]:
    """All there is to draw: of a watch, the last look."""
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
            "What breaking large pages would free",
            "The best large pages are broken first: where the line is steep a few of them free much, where it is flat "
            "they are better left whole. At 0 stands what can be had without breaking any.",
            lines(
                "Memory freed by the number of large pages broken",
                [Line("if all could be shared", 2, every, area=True), Line("possible here", 1, possible)],
                lambda value: f"{value:,.0f}",
                size,
                "large pages broken",
                binary=True,
            ),
            (("large pages broken", "count"), ("if all could be shared", "bytes"), ("possible here", "bytes")),
            thinned([(one.large_pages, one.reclaimable, one.possible) for one in result.curve], MOST_ROWS),
            ((2, "if all could be shared"), (1, "possible here")),
        )
    ]


def _classes(result: SharingResult) -> list[Figure]:
    drawn = [Bar(TITLES.get(name, name), found.reclaimable) for name, found in result.classes.items()]
    return [
        Figure(
            "classes",
            "What is there twice",
            "Memory that sharing would free, by what the pages are: equal within one workload, or between several.",
            bars("Reclaimable memory by class", drawn, size),
            (("pages of", "text"), ("found", "count"), ("reclaimable", "bytes")),
            [(TITLES.get(name, name), found.pages, found.reclaimable) for name, found in result.classes.items()],
            ((1, "reclaimable"),),
        )
    ]
