"""Figures of a checkpoint: progress, downtime and classes of pages."""

from __future__ import annotations

from pageferry.checkpoints.events import ArmedEvent, CheckpointResult, InstantEvent, SavingEvent
from pageferry.report.charts import Axes, Bar, Line, bars, lines, stack
from pageferry.report.event_log import Log
from pageferry.report.figures.base import FORMS, Fact, Figure, thinned, time_axis
from pageferry.report.units import duration, size

PAGE = 4096
MAX_ROWS = 40
"""Maximum number of rows of a table."""


def facts(log: Log) -> list[Fact]:
    """Return the facts of a checkpoint."""
    results, armed = log.of(CheckpointResult), log.of(ArmedEvent)
    if not results:
        return [Fact("present", armed[0][1].present, "bytes", lead=True)] if armed else []
    result = results[-1][1]
    paused = [Fact("workload", "paused", note="as its user had left it")] if result.paused else []
    return [
        Fact("downtime", result.downtime, "ms", lead=True, note="the workload was paused"),
        Fact("total time", result.total_time, "ms", lead=True),
        Fact("image", result.bytes_written, "bytes", lead=True, note=f"memory: {size(result.memory)}"),
        Fact("trapped writes", result.traps, "count", lead=True, note="waited for a copy of their block"),
        Fact("maximum wait", result.trap_details.longest_us, "us"),
        Fact("compression", f"{result.compression:.2f} : 1"),
        *paused,
        Fact("codec", result.codec),
        Fact("mode", result.mode),
        Fact("parent", result.parent),
        Fact("time to protect", result.arm_time, "ms"),
    ]


def figures(log: Log) -> list[Figure]:
    """Return the figures of a checkpoint."""
    results = log.of(CheckpointResult)
    drawn = _progress(log)
    if results:
        drawn += [*_downtime(results[-1][1]), *_classes(results[-1][1])]
    return drawn


def _progress(log: Log) -> list[Figure]:
    events = log.of(SavingEvent)
    if not events:
        return []
    saved = [(at / 1e3, one.done * PAGE) for at, one in events]
    stored = [(at / 1e3, one.stored) for at, one in events]
    for at, _ in log.of(InstantEvent)[:1]:
        saved.insert(0, (at / 1e3, 0))
        stored.insert(0, (at / 1e3, 0))
    for at, result in log.of(CheckpointResult)[-1:]:
        saved.append((at / 1e3, events[-1][1].total * PAGE))
        stored.append((at / 1e3, result.bytes_written))
    marks = [(at / 1e3, "snapshot point") for at, _ in log.of(InstantEvent)[:1]]
    return [
        Figure(
            "saving",
            "Progress",
            "Memory saved as of the snapshot point, and compressed bytes written to the image.",
            lines(
                "Memory saved and bytes stored over time",
                [Line("memory saved", 1, saved, area=True), Line("in the image", 5, stored)],
                Axes(time_axis(saved[-1][0]), size, "time since the command began"),
                marks,
            ),
            (("time", "ms"), ("memory saved", "bytes"), ("in the image", "bytes"), ("trapped writes", "count")),
            thinned([(at, one.done * PAGE, one.stored, one.traps) for at, one in events], MAX_ROWS),
            ((1, "memory saved"), (5, "in the image")),
        )
    ]


def _downtime(result: CheckpointResult) -> list[Figure]:
    parts = result.downtime_parts
    named = [
        ("stop", parts.stop),
        ("device state", parts.device_state),
        ("protect", parts.protect),
        ("save", parts.save),
        ("resume", parts.resume),
    ]
    named = [(name, value) for name, value in named if value or name not in ("save", "protect")]
    drawn = [Bar("downtime", parts.total, 3), *(Bar(name, value) for name, value in named)]
    return [
        Figure(
            "downtime",
            "Downtime",
            "Time for which the workload was paused, and its measured parts.",
            bars(f"The downtime of {duration(parts.total / 1e3)} and its parts", drawn, FORMS["ms"]),
            (("part", "text"), ("time", "ms")),
            [("downtime", parts.total), *named],
            ((3, "total"), (1, "part")),
        )
    ]


def _classes(result: CheckpointResult) -> list[Figure]:
    pages = result.pages
    named = [
        ("data", pages.data, 1),
        ("identical to the parent", pages.in_parent, 5),
        ("duplicate", pages.same_as, 4),
        ("one pattern", pages.pattern, 3),
        ("zero", pages.zero, 2),
        ("not present", pages.absent, 0),
    ]
    drawn = [Bar(name, count * PAGE, colour) for name, count, colour in named]
    return [
        Figure(
            "classes",
            "Pages by class",
            "All pages of the workload by class. Only data pages occupy space in the image.",
            stack("Pages by class", drawn, size),
            (("class", "text"), ("pages", "count"), ("memory", "bytes")),
            [(name, count, count * PAGE) for name, count, _ in named],
            tuple((colour, name) for name, count, colour in named if count),
        )
    ]
