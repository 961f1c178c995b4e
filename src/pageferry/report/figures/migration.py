"""A migration drawn: rounds, speeds, downtime, large pages before and after."""

from __future__ import annotations

from pageferry.migration.events import LargePagesEvent, MigrationResult, PostcopyEvent, RoundEvent, SetupEvent
from pageferry.report.charts import Bar, Line, Series, Strip, bars, columns, lines, strips
from pageferry.report.event_log import Log
from pageferry.report.figures.base import FORMS, Fact, Figure, thinned, time_axis
from pageferry.report.figures.latency import latency
from pageferry.report.units import duration, rate, size

MOST_ROWS = 40
RESULTS = ("migration", "demo")


def result_of(log: Log) -> MigrationResult | None:
    """The result, of whichever verb."""
    found = log.of(MigrationResult, *RESULTS)
    return found[-1][1] if found else None


def facts(log: Log) -> list[Fact]:
    """What it comes down to; without a result, how far it has come."""
    result, rounds = result_of(log), log.of(RoundEvent)
    if result is None:
        return _unfinished(log)
    large, faults = result.large_pages, result.faults_after_resume
    kept = f"{large.destination} of {large.source}"
    told = [
        Fact("downtime", result.downtime, "ms", lead=True, note="nobody ran the workload"),
        Fact("total time", result.total_time, "ms", lead=True),
        Fact("transferred", result.transferred, "bytes", lead=True, note=f"memory: {size(result.memory)}"),
        Fact("large pages kept", kept, lead=bool(large.source)),
        Fact("throughput", result.mbps * 1e6 / 8, "bytes/s"),
        Fact("rounds", len(rounds), "count"),
        Fact("mode", result.mode),
        Fact("peer", result.peer),
        Fact("set-up", result.setup_time, "ms"),
        Fact("write trace", result.trace.granularity, note=f"installed in {duration(result.trace.install_ms / 1e3)}"),
        Fact("pages sent", result.normal, "count"),
        Fact("pages of zeros", result.duplicate, "count"),
    ]
    if (late := result.postcopy) is not None:
        after = f"{late.pages:,} pages after it ran there"
        told.insert(2, Fact("all pages there", late.time, "ms", lead=True, note=after))
        told.append(Fact("accesses that waited", late.faults, "count", note=f"{result.postcopy_requests:,} requests"))
        told.append(Fact("99 of 100 within", late.waits.p99_us, "us", note="of accesses that waited"))
    if faults is not None:
        told.append(Fact("faults in the first second", faults.minor + faults.major, "count"))
    for line in log.lines:
        if line.tag == "demo":
            told.insert(0, Fact("every write is there", "yes" if line.fields.get("intact") else "NO", lead=True))
    return told


def _unfinished(log: Log) -> list[Fact]:
    setup, rounds = log.of(SetupEvent), log.of(RoundEvent)
    if not setup:
        return []
    begun = setup[0][1]
    sent = sum(event.sent for _, event in rounds)
    told = [
        Fact("rounds", len(rounds), "count", lead=True),
        Fact("sent", sent, "bytes", lead=True, note=f"in memory: {size(begun.present)}"),
        Fact("peer", begun.peer),
    ]
    if rounds:
        told.insert(1, Fact("left to send", rounds[-1][1].remaining, "bytes", lead=True))
    return told


def figures(log: Log) -> list[Figure]:
    """All there is to draw."""
    result = result_of(log)
    waits = latency(result.postcopy.waits) if result is not None and result.postcopy is not None else []
    return [*_rounds(log), *_downtime(result), *_postcopy(log), *waits, *_large_pages(log)]


def _rounds(log: Log) -> list[Figure]:
    rounds = [event for _, event in log.of(RoundEvent)]
    if not rounds:
        return []
    names = [str(event.round) for event in rounds]
    sent, left = [event.sent for event in rounds], [event.remaining for event in rounds]
    amounts = columns(
        f"Bytes sent and bytes modified meanwhile, in {len(rounds)} rounds",
        names,
        [Series("sent", 1, sent), Series("modified meanwhile", 2, left)],
        size,
        "round",
        binary=True,
    )
    speed = [event.mbps * 1e6 / 8 for event in rounds]
    speeds = columns(
        f"Speed of the link and of the workload's writes, in {len(rounds)} rounds",
        names,
        [Series("on the wire", 1, speed), Series("modified by the workload", 3, [one.dirty_rate for one in rounds])],
        rate,
        "round",
        binary=True,
    )
    return [
        Figure(
            "rounds",
            "Rounds",
            "What each round sent over the wire, and how much memory was modified meanwhile and had to be sent again.",
            amounts,
            (
                ("round", "count"),
                ("pages", "count"),
                ("sent", "bytes"),
                ("modified meanwhile", "bytes"),
                ("time", "ms"),
            ),
            [(one.round, one.pages, one.sent, one.remaining, one.ms) for one in rounds],
            ((1, "sent"), (2, "modified meanwhile")),
        ),
        Figure(
            "speeds",
            "Speed against dirty rate",
            "Rounds become smaller as long as memory is sent faster than it is modified. On the wire pages are "
            "compressed; modified memory is counted as it is.",
            speeds,
            (("round", "count"), ("on the wire", "bytes/s"), ("modified by the workload", "bytes/s")),
            [(one.round, value, one.dirty_rate) for one, value in zip(rounds, speed, strict=True)],
            ((1, "on the wire"), (3, "modified by the workload")),
        ),
    ]


def _downtime(result: MigrationResult | None) -> list[Figure]:
    if result is None:
        return []
    parts = result.downtime_parts
    named = [
        ("stop", parts.stop),
        ("last pages", parts.last_pages),
        ("device state", parts.device_state),
        ("populate", parts.populate),
        ("resume", parts.resume),
    ]
    drawn = [Bar("downtime", parts.total, 3), *(Bar(name, value, 1) for name, value in named)]
    return [
        Figure(
            "downtime",
            "Where the pause went",
            "All in which nobody ran the workload, and its parts. Last pages and device state go at the same time, and "
            "the way of messages is in no part, so the parts are no sum.",
            bars(f"The downtime of {duration(parts.total / 1e3)} and its parts", drawn, FORMS["ms"]),
            (("part", "text"), ("time", "ms")),
            [("downtime", parts.total), *named],
            ((3, "all of it"), (1, "a part")),
        )
    ]


def _postcopy(log: Log) -> list[Figure]:
    told = log.of(PostcopyEvent)
    if len(told) < 2:
        return []
    drawn = [(at / 1e3, float(one.remaining)) for at, one in told]
    return [
        Figure(
            "postcopy",
            "After the switch-over",
            "Memory that the destination, where the workload runs already, still has to get. Accesses to it wait.",
            lines(
                "Memory still to come over time",
                [Line("still to come", 2, drawn, area=True)],
                time_axis(drawn[-1][0]),
                size,
                "time since the command began",
                binary=True,
            ),
            (("time", "ms"), ("still to come", "bytes"), ("requests", "count")),
            thinned([(at, one.remaining, one.postcopy_requests) for at, one in told], MOST_ROWS),
            ((2, "still to come"),),
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
            "Large pages, before and after",
            "Where memory stands on pages of 2 MiB: at the source when the migration began, at the destination a "
            "second after. The stronger the colour, the more; what is empty is small pages, or not in memory.",
            strips("Maps of large pages", strip, "first byte", "last byte"),
            (("region", "text"), ("side", "text"), ("2 MiB units", "count"), ("large", "count"), ("part", "part")),
            rows,
            ((1, "source"), (4, "destination")),
        )
    ]
