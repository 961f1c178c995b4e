"""A restore drawn: how memory arrived, how long accesses waited, and what was touched first."""

from __future__ import annotations

from pageferry.checkpoints.restore_events import ProgressEvent, RestoreResult, RunningEvent, TouchedEvent
from pageferry.report.charts import Bar, Line, bars, dots, lines
from pageferry.report.event_log import Log
from pageferry.report.figures.base import FORMS, Fact, Figure, thinned, time_axis
from pageferry.report.figures.latency import latency
from pageferry.report.units import duration, size

WINDOW = 16 * 4096
MOST_DOTS = 2000
MOST_ROWS = 40


def facts(log: Log) -> list[Fact]:
    """What it comes down to."""
    results, running = log.of(RestoreResult), log.of(RunningEvent)
    if not results:
        return [Fact("time to running", running[0][1].time_to_running, "ms", lead=True)] if running else []
    at, result = results[-1]
    times = result.service_times
    told = [
        Fact("time to running", result.time_to_running, "ms", lead=True, note="QEMU's own start apart"),
        Fact("accesses that waited", result.faults, "count", lead=True),
        Fact("99 of 100 within", times.p99_us, "us", lead=True, note=f"longest: {duration(times.longest_us / 1e6)}"),
        Fact("memory", result.memory, "bytes"),
        Fact("to missing pages", result.missed, "count", note="of the accesses that waited"),
        Fact("read ahead", result.prefetched * 4096, "bytes", note="before it was asked for"),
        Fact("read from the image", result.bytes_read, "bytes"),
        Fact("image", result.image),
    ]
    if result.status == "completed":
        told.insert(1, Fact("all memory there", at, "ms", lead=True, note="after the command began"))
    else:
        told.insert(1, Fact("still to come", result.deferred, "bytes", lead=True))
    return told


def figures(log: Log) -> list[Figure]:
    """All there is to draw."""
    results = log.of(RestoreResult)
    drawn = [*_arrival(log), *_working_set(log)]
    if results:
        result = results[-1][1]
        drawn = [*_running(result), *drawn, *latency(result.service_times)]
    return drawn


def _running(result: RestoreResult) -> list[Figure]:
    parts = result.time_parts
    named = [
        ("adopt", parts.adopt),
        ("device state", parts.device_state),
        ("resume", parts.resume),
    ]
    beside = [("QEMU's start", parts.qemu_start), ("open the image", parts.open_image)]
    drawn = [
        Bar("until it ran", result.time_to_running, 3),
        *(Bar(name, value) for name, value in named),
        *(Bar(name, value, 0) for name, value in beside),
    ]
    return [
        Figure(
            "running",
            "Until it ran",
            "From the command to the guest running. The start of QEMU itself, and the opening of the image meanwhile, "
            "are shown apart: they are not counted.",
            bars("Time until the guest ran and its parts", drawn, FORMS["ms"]),
            (("part", "text"), ("time", "ms")),
            [("until it ran", result.time_to_running), *named, *beside],
            ((3, "all of it"), (1, "a part"), (0, "not counted")),
        )
    ]


def _arrival(log: Log) -> list[Figure]:
    running, told = log.of(RunningEvent), log.of(ProgressEvent)
    if not running or not told:
        return []
    begun, first = running[0]
    left = [(begun / 1e3, float(first.deferred)), *((at / 1e3, float(one.deferred)) for at, one in told)]
    return [
        Figure(
            "arrival",
            "How memory arrived",
            "What is still to come from the image while the guest runs already.",
            lines(
                "Memory still to come over time",
                [Line("still to come", 2, left, area=True)],
                time_axis(left[-1][0]),
                size,
                "time since the command began",
                binary=True,
                marks=[(begun / 1e3, "it runs")],
            ),
            (("time", "ms"), ("still to come", "bytes"), ("accesses that waited", "count"), ("read", "bytes")),
            thinned([(at, one.deferred, one.faults, one.bytes_read) for at, one in told], MOST_ROWS),
            ((2, "still to come"),),
        )
    ]


def _working_set(log: Log) -> list[Figure]:
    seen = dict.fromkeys(window for _, event in log.of(TouchedEvent) for window in event.windows)
    results = log.of(RestoreResult)
    if not seen:
        return []
    order = [(number + 1, window * WINDOW) for number, window in enumerate(seen)]
    memory = results[-1][1].memory if results else max(seen) * WINDOW
    shown = thinned(order, MOST_DOTS)
    left_out = f" One of {len(order) / len(shown):.0f} is drawn." if len(shown) < len(order) else ""
    return [
        Figure(
            "working-set",
            "What was touched first",
            f"{len(order):,} windows of 64 KiB ({size(len(order) * WINDOW)}) that the guest missed, in the order in "
            f"which it did. A line that rises is memory walked through; a cloud is random access.{left_out}",
            dots(
                "Places in memory in the order of their first access",
                shown,
                (len(order), memory),
                lambda value: f"{value:,.0f}",
                size,
                "order of first access",
            ),
            (("order", "count"), ("place", "bytes")),
            thinned(order, MOST_ROWS),
            ((1, "a window of 64 KiB"),),
        )
    ]
