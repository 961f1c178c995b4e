"""Figures of a restore: time to running, loading of memory, service times and working set."""

from __future__ import annotations

from pageferry.checkpoints.events import ProgressEvent, RestoreResult, RunningEvent, TouchedEvent
from pageferry.report.charts import Axes, Bar, Line, bars, dots, lines
from pageferry.report.event_log import Log
from pageferry.report.figures.base import FORMS, Fact, Figure, thinned, time_axis
from pageferry.report.figures.latency import latency
from pageferry.report.units import duration, size

WINDOW = 16 * 4096
MAX_DOTS = 2000
"""Maximum number of points of the scatter plot."""
MAX_ROWS = 40
"""Maximum number of rows of a table."""


def facts(log: Log) -> list[Fact]:
    """Return the facts of a restore."""
    results, running = log.of(RestoreResult), log.of(RunningEvent)
    if not results:
        return [Fact("time to running", running[0][1].time_to_running, "ms", lead=True)] if running else []
    at, result = results[-1]
    times = result.service_times
    facts = [
        Fact("time to running", result.time_to_running, "ms", lead=True, note="without the start of QEMU"),
        Fact("faults", result.faults, "count", lead=True),
        Fact(
            "p99 of service times", times.p99_us, "us", lead=True, note=f"maximum: {duration(times.longest_us / 1e6)}"
        ),
        Fact("memory", result.memory, "bytes"),
        Fact("faults on deferred pages", result.missed, "count"),
        Fact("prefetched", result.prefetched * 4096, "bytes", note="loaded before their first access"),
        Fact("read from the image", result.bytes_read, "bytes"),
        Fact("image", result.image),
    ]
    if result.paused:
        facts.append(Fact("guest", "paused", note="as it was saved" if result.was_paused else "as requested"))
    if result.status == "completed":
        facts.insert(1, Fact("all memory loaded", at, "ms", lead=True, note="since the start of the command"))
    else:
        facts.insert(1, Fact("deferred", result.deferred, "bytes", lead=True))
    return facts


def figures(log: Log) -> list[Figure]:
    """Return the figures of a restore."""
    results = log.of(RestoreResult)
    drawn = [*_loading(log), *_working_set(log)]
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
    concurrent = [("start of QEMU", parts.qemu_start), ("open the image", parts.open_image)]
    drawn = [
        Bar("time to running", result.time_to_running, 3),
        *(Bar(name, value) for name, value in named),
        *(Bar(name, value, 0) for name, value in concurrent),
    ]
    return [
        Figure(
            "running",
            "Time to running",
            "Time from the command until the guest runs. The start of QEMU, during which the image is opened, is shown "
            "separately and not counted.",
            bars("Time to running and its parts", drawn, FORMS["ms"]),
            (("part", "text"), ("time", "ms")),
            [("time to running", result.time_to_running), *named, *concurrent],
            ((3, "total"), (1, "part"), (0, "not counted")),
        )
    ]


def _loading(log: Log) -> list[Figure]:
    running, events = log.of(RunningEvent), log.of(ProgressEvent)
    if not running or not events:
        return []
    start, first = running[0]
    left = [(start / 1e3, float(first.deferred)), *((at / 1e3, float(one.deferred)) for at, one in events)]
    return [
        Figure(
            "arrival",
            "Loading",
            "Deferred memory while the guest runs: contents that have not been loaded from the image yet.",
            lines(
                "Deferred memory over time",
                [Line("deferred", 2, left, area=True)],
                Axes(time_axis(left[-1][0]), size, "time since the start of the command"),
                [(start / 1e3, "running")],
            ),
            (("time", "ms"), ("deferred", "bytes"), ("faults", "count"), ("read", "bytes")),
            thinned([(at, one.deferred, one.faults, one.bytes_read) for at, one in events], MAX_ROWS),
            ((2, "deferred"),),
        )
    ]


def _working_set(log: Log) -> list[Figure]:
    seen = dict.fromkeys(window for _, event in log.of(TouchedEvent) for window in event.windows)
    results = log.of(RestoreResult)
    if not seen:
        return []
    order = [(number + 1, window * WINDOW) for number, window in enumerate(seen)]
    memory = results[-1][1].memory if results else max(seen) * WINDOW
    shown = thinned(order, MAX_DOTS)
    thinning = f" One of {len(order) / len(shown):.0f} is shown." if len(shown) < len(order) else ""
    return [
        Figure(
            "working-set",
            "Order of first accesses",
            f"{len(order):,} windows of 64 KiB ({size(len(order) * WINDOW)}) in the order in which the guest first "
            f"faulted on them. A rising line is sequential access, a cloud is random access.{thinning}",
            dots(
                "Windows of memory in the order of their first access",
                shown,
                (len(order), memory),
                Axes(lambda value: f"{value:,.0f}", size, "order of first access"),
            ),
            (("order", "count"), ("offset", "bytes")),
            thinned(order, MAX_ROWS),
            ((1, "a window of 64 KiB"),),
        )
    ]
