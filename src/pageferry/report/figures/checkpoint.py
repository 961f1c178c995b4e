"""A checkpoint drawn: how it went on, the pause, and what the pages were."""

from __future__ import annotations

from pageferry.checkpoints.events import ArmedEvent, CheckpointResult, InstantEvent, SavingEvent
from pageferry.report.charts import Bar, Line, bars, lines, stack
from pageferry.report.event_log import Log
from pageferry.report.figures.base import FORMS, Fact, Figure, thinned, time_axis
from pageferry.report.units import duration, size

PAGE = 4096
MOST_ROWS = 40


def facts(log: Log) -> list[Fact]:
    """What it comes down to."""
    results, armed = log.of(CheckpointResult), log.of(ArmedEvent)
    if not results:
        return [Fact("in memory", armed[0][1].present, "bytes", lead=True)] if armed else []
    result = results[-1][1]
    return [
        Fact("downtime", result.downtime, "ms", lead=True, note="the workload was paused"),
        Fact("total time", result.total_time, "ms", lead=True),
        Fact("image", result.bytes_written, "bytes", lead=True, note=f"memory: {size(result.memory)}"),
        Fact("writes that waited", result.traps, "count", lead=True, note="for their block to be copied"),
        Fact("longest wait", result.trap_details.longest_us, "us"),
        Fact("compression", f"{result.compression:.2f} : 1"),
        Fact("codec", result.codec),
        Fact("mode", result.mode),
        Fact("parent", result.parent),
        Fact("protected in", result.arm_time, "ms"),
    ]


def figures(log: Log) -> list[Figure]:
    """All there is to draw."""
    results = log.of(CheckpointResult)
    drawn = _progress(log)
    if results:
        drawn += [*_downtime(results[-1][1]), *_classes(results[-1][1])]
    return drawn


def _progress(log: Log) -> list[Figure]:
    told = log.of(SavingEvent)
    if not told:
        return []
    saved = [(at / 1e3, one.done * PAGE) for at, one in told]
    stored = [(at / 1e3, one.stored) for at, one in told]
    for at, _ in log.of(InstantEvent)[:1]:
        saved.insert(0, (at / 1e3, 0))
        stored.insert(0, (at / 1e3, 0))
    for at, result in log.of(CheckpointResult)[-1:]:
        saved.append((at / 1e3, told[-1][1].total * PAGE))
        stored.append((at / 1e3, result.bytes_written))
    marks = [(at / 1e3, "the moment saved") for at, _ in log.of(InstantEvent)[:1]]
    return [
        Figure(
            "saving",
            "Saving while it runs",
            "Memory that is safe from the workload's writes, and what of it is in the image, compressed.",
            lines(
                "Memory saved and bytes stored over time",
                [Line("memory saved", 1, saved, area=True), Line("in the image", 5, stored)],
                time_axis(saved[-1][0]),
                size,
                "time since the command began",
                binary=True,
                marks=marks,
            ),
            (("time", "ms"), ("memory saved", "bytes"), ("in the image", "bytes"), ("writes that waited", "count")),
            thinned([(at, one.done * PAGE, one.stored, one.traps) for at, one in told], MOST_ROWS),
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
            "Where the pause went",
            "All in which the workload did not run, and the parts that were measured.",
            bars(f"The downtime of {duration(parts.total / 1e3)} and its parts", drawn, FORMS["ms"]),
            (("part", "text"), ("time", "ms")),
            [("downtime", parts.total), *named],
            ((3, "all of it"), (1, "a part")),
        )
    ]


def _classes(result: CheckpointResult) -> list[Figure]:
    pages = result.pages
    named = [
        ("contents", pages.data, 1),
        ("as in the parent", pages.in_parent, 5),
        ("same as another", pages.same_as, 4),
        ("one pattern", pages.pattern, 3),
        ("zeros", pages.zero, 2),
        ("not in memory", pages.absent, 0),
    ]
    drawn = [Bar(name, count * PAGE, colour) for name, count, colour in named]
    return [
        Figure(
            "classes",
            "What the memory was",
            "All pages of the workload by class. Only contents take room in the image.",
            stack("Pages by class", drawn, size),
            (("class", "text"), ("pages", "count"), ("memory", "bytes")),
            [(name, count, count * PAGE) for name, count, _ in named],
            tuple((colour, name) for name, count, colour in named if count),
        )
    ]
