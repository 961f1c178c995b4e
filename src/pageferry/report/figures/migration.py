"""Figures of a migration: rounds, rates, downtime, post-copy and huge pages before and after."""

from __future__ import annotations

from collections.abc import Sequence

from pageferry.demo.events import DemoResult
from pageferry.migration.events import (
    DiskProgressEvent,
    LargePagesEvent,
    MigrationResult,
    PostcopyEvent,
    RoundEvent,
    SetupEvent,
)
from pageferry.report.charts import Axes, Bar, Line, Series, Strip, bars, columns, lines, strips
from pageferry.report.event_log import Log
from pageferry.report.figures.base import FORMS, Fact, Figure, thinned, time_axis
from pageferry.report.figures.latency import latency
from pageferry.report.units import duration, rate, size

MAX_ROWS = 40
"""Maximum number of rows of a table."""


def result_of(log: Log) -> MigrationResult | None:
    """Return the result of `migrate` or `demo`; None if the log does not contain it."""
    found: Sequence[tuple[float, MigrationResult]] = log.of(MigrationResult) or log.of(DemoResult)
    return found[-1][1] if found else None


def facts(log: Log) -> list[Fact]:
    """Return the facts of a migration. Without a result, they describe its progress."""
    result, rounds = result_of(log), log.of(RoundEvent)
    if result is None:
        return _unfinished(log)
    large, faults = result.large_pages, result.faults_after_resume
    kept = f"{large.destination} of {large.source}"
    facts = [
        Fact("downtime", result.downtime, "ms", lead=True, note="the workload was paused"),
        Fact("total time", result.total_time, "ms", lead=True),
        Fact("transferred", result.transferred, "bytes", lead=True, note=f"memory: {size(result.memory)}"),
        Fact("huge pages preserved", kept, lead=bool(large.source)),
        Fact("throughput", result.mbps * 1e6 / 8, "bytes/s"),
        Fact("rounds", len(rounds), "count"),
        Fact("mode", result.mode),
        Fact("peer", result.peer),
        Fact("set-up", result.setup_time, "ms"),
        Fact("write trace", result.trace.granularity, note=f"installed in {duration(result.trace.install_ms / 1e3)}"),
        Fact("pages sent", result.normal, "count"),
        Fact("zero pages", result.duplicate, "count"),
        *([Fact("workload", "paused", note="as its user had left it")] if result.paused else []),
    ]
    if (postcopy := result.postcopy) is not None:
        after = f"{postcopy.pages:,} pages after the switch-over"
        facts.insert(2, Fact("post-copy phase", postcopy.time, "ms", lead=True, note=after))
        facts.append(Fact("deferred faults", postcopy.faults, "count", note=f"{result.postcopy_requests:,} requests"))
        facts.append(Fact("p99 of service times", postcopy.waits.p99_us, "us"))
    if result.disks:
        copied = f"{size(sum(disk.size for disk in result.disks))} in {len(result.disks)} disks"
        facts.insert(3, Fact("sent for disks", result.disks_transferred, "bytes", lead=True, note=copied))
    if faults is not None:
        facts.append(Fact("faults in the first second", faults.minor + faults.major, "count"))
    if isinstance(result, DemoResult):
        facts.insert(0, Fact("lost writes", "none" if result.intact else "SOME", lead=True))
    return facts


def _unfinished(log: Log) -> list[Fact]:
    setup, rounds = log.of(SetupEvent), log.of(RoundEvent)
    if not setup:
        return []
    start = setup[0][1]
    sent = sum(event.sent for _, event in rounds)
    facts = [
        Fact("rounds", len(rounds), "count", lead=True),
        Fact("sent", sent, "bytes", lead=True, note=f"present: {size(start.present)}"),
        Fact("peer", start.peer),
    ]
    if rounds:
        facts.insert(1, Fact("remaining", rounds[-1][1].remaining, "bytes", lead=True))
    return facts


def figures(log: Log) -> list[Figure]:
    """Return the figures of a migration."""
    result = result_of(log)
    waits = latency(result.postcopy.waits) if result is not None and result.postcopy is not None else []
    return [*_rounds(log), *_disks(log), *_downtime(result), *_postcopy(log), *waits, *_large_pages(log)]


def _rounds(log: Log) -> list[Figure]:
    rounds = [event for _, event in log.of(RoundEvent)]
    if not rounds:
        return []
    names = ["post-copy" if event.postcopy else str(event.round) for event in rounds]
    return [_amounts(rounds, names), _speeds(rounds, names)]


def _amounts(rounds: list[RoundEvent], names: list[str]) -> Figure:
    sent, left = [event.sent for event in rounds], [event.remaining for event in rounds]
    chart = columns(
        f"Bytes sent and bytes modified in {len(rounds)} rounds",
        names,
        [Series("sent", 1, sent), Series("modified", 2, left)],
        size,
        "round",
        binary=True,
    )
    return Figure(
        "rounds",
        "Rounds",
        "Bytes that each round sent, and memory that was modified during the round and had to be sent again.",
        chart,
        (("round", "count"), ("pages", "count"), ("sent", "bytes"), ("modified", "bytes"), ("time", "ms")),
        [(one.round, one.pages, one.sent, one.remaining, one.ms) for one in rounds],
        ((1, "sent"), (2, "modified")),
    )


def _speeds(rounds: list[RoundEvent], names: list[str]) -> Figure:
    speed = [event.mbps * 1e6 / 8 for event in rounds]
    chart = columns(
        f"Send rate and dirty rate in {len(rounds)} rounds",
        names,
        [Series("send rate", 1, speed), Series("dirty rate", 3, [one.dirty_rate for one in rounds])],
        rate,
        "round",
        binary=True,
    )
    return Figure(
        "speeds",
        "Send rate and dirty rate",
        "Rounds become smaller while memory is sent faster than it is modified. The send rate counts compressed "
        "bytes; the dirty rate counts uncompressed memory.",
        chart,
        (("round", "count"), ("send rate", "bytes/s"), ("dirty rate", "bytes/s")),
        [(one.round, value, one.dirty_rate) for one, value in zip(rounds, speed, strict=True)],
        ((1, "send rate"), (3, "dirty rate")),
    )


def _disks(log: Log) -> list[Figure]:
    events = log.of(DiskProgressEvent)
    if len(events) < 2:
        return []
    drawn = [(at / 1e3, float(one.remaining)) for at, one in events]
    return [
        Figure(
            "disks",
            "Disks",
            "Contents of the disks that are left to copy. The guest keeps writing, so the last writes are copied while "
            "it is paused.",
            lines(
                "Bytes of disks left to copy over time",
                [Line("left to copy", 2, drawn, area=True)],
                Axes(time_axis(drawn[-1][0]), size, "time since the start of the command"),
            ),
            (("time", "ms"), ("copied", "bytes"), ("left to copy", "bytes"), ("sent", "bytes")),
            thinned([(at, one.done, one.remaining, one.sent) for at, one in events], MAX_ROWS),
            ((2, "left to copy"),),
        )
    ]


def _downtime(result: MigrationResult | None) -> list[Figure]:
    if result is None:
        return []
    parts = result.downtime_parts
    named = [
        ("stop", parts.stop),
        ("last pages", parts.last_pages),
        ("device state", parts.device_state),
        *([("disks", parts.disks)] if result.disks else []),
        ("populate", parts.populate),
        ("resume", parts.resume),
    ]
    drawn = [Bar("downtime", parts.total, 3), *(Bar(name, value, 1) for name, value in named)]
    return [
        Figure(
            "downtime",
            "Downtime",
            "Time for which the workload was paused, and its parts. Last pages and device state are sent concurrently, "
            "and message latency is not part of any of them, so the parts do not add up to the total.",
            bars(f"The downtime of {duration(parts.total / 1e3)} and its parts", drawn, FORMS["ms"]),
            (("part", "text"), ("time", "ms")),
            [("downtime", parts.total), *named],
            ((3, "total"), (1, "part")),
        )
    ]


def _postcopy(log: Log) -> list[Figure]:
    events = log.of(PostcopyEvent)
    if len(events) < 2:
        return []
    drawn = [(at / 1e3, float(one.remaining)) for at, one in events]
    return [
        Figure(
            "postcopy",
            "Post-copy",
            "Deferred memory while the workload runs at the destination. Accesses to this memory wait.",
            lines(
                "Deferred memory over time",
                [Line("deferred", 2, drawn, area=True)],
                Axes(time_axis(drawn[-1][0]), size, "time since the start of the command"),
            ),
            (("time", "ms"), ("deferred", "bytes"), ("requests", "count")),
            thinned([(at, one.remaining, one.postcopy_requests) for at, one in events], MAX_ROWS),
            ((2, "deferred"),),
        )
    ]


def _large_pages(log: Log) -> list[Figure]:
    maps = [event for _, event in log.of(LargePagesEvent)]
    if not maps or not any(sum(region.cells) for event in maps for region in event.regions):
        return []
    rows, strip = [], []
    for number, first in enumerate(maps[0].regions):
        for event in maps:
            if number >= len(event.regions):
                continue
            region = event.regions[number]
            units = max(-(-region.length // (2 << 20)), 1)
            filled = [
                count / min(region.per_cell, units - cell * region.per_cell) for cell, count in enumerate(region.cells)
            ]
            large = sum(region.cells)
            strip.append(
                Strip(f"{first.region}, {event.side}", filled, f"{large} / {units}", 1 + 3 * (event.side != "source"))
            )
            rows.append((region.region, event.side, units, large, large / units))
    return [
        Figure(
            "large-pages",
            "Huge pages before and after",
            "Memory backed by pages of 2 MiB: at the source at the start of the migration, at the destination one "
            "second after its end. A stronger colour means more huge pages; empty cells have none.",
            strips("Maps of huge pages", strip, "first byte", "last byte"),
            (
                ("region", "text"),
                ("side", "text"),
                ("2 MiB units", "count"),
                ("huge pages", "count"),
                ("fraction", "part"),
            ),
            rows,
            ((1, "source"), (4, "destination")),
        )
    ]
