"""Statistics of a migration at the source: its events, its result, and the error if it does not converge."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from pageferry.errors import NotConverging
from pageferry.events import Latency
from pageferry.memory.regions import SMALL_PAGE
from pageferry.migration import events
from pageferry.migration.engine_call import Counters
from pageferry.migration.transport import messages

if TYPE_CHECKING:
    from pageferry.migration.postcopy_source import PageService
    from pageferry.migration.source import Source

PROGRESS_INTERVAL = 0.2
"""Seconds between progress events."""


def report_setup(source: Source) -> None:
    """Report the setup: the peer, the size of the memory and its huge pages."""
    source.listener(
        events.SetupEvent(
            peer=source.peer,
            memory=source.memory.size,
            present=source.memory.present(),
            large_pages=sum(map(sum, source.large)),
            install_ms=_ms(source.install_seconds),
        )
    )
    _report_large_pages(source, "source", source.large)


async def report_progress(source: Source, number: int, total: int) -> None:
    """Report the progress of a round of `total` pages until cancelled."""
    start, since = source.sender.progress, time.perf_counter()
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL)
        now = source.sender.progress
        bits = (now[0] - start[0]) * 8
        mbps = bits / 1e6 / (time.perf_counter() - since)
        done = sum(now[2:]) - sum(start[2:])
        source.listener(events.ProgressEvent(round=number, done=done, total=total, mbps=round(mbps, 1)))


def round_event(
    source: Source, before: Counters, seconds: float, *, remaining: int = 0, modified: int = 0
) -> events.RoundEvent:
    """Return the event of a completed round. `before`: counters at its start; `remaining`: pages to send after it, of
    which `modified` were written during the round."""
    event = _round(source, before, source.sender.progress, seconds)
    return with_remaining(msgspec.structs.replace(event, dirty_rate=round(modified * SMALL_PAGE / seconds)), remaining)


def with_remaining(event: events.RoundEvent, pages: int) -> events.RoundEvent:
    """Return the event with the number of pages that were left to send after the round."""
    return msgspec.structs.replace(event, remaining=pages * SMALL_PAGE)


def postcopy_round(source: Source, service: PageService, seconds: float) -> events.RoundEvent:
    """Return the event of the pages sent after the switch-over, as the last round."""
    return msgspec.structs.replace(_round(source, (0, 0, 0, 0, 0), service.counters, seconds), postcopy=True)


def _round(source: Source, before: Counters, after: Counters, seconds: float) -> events.RoundEvent:
    sent = after[0] - before[0]
    return events.RoundEvent(
        round=source.round,
        pages=sum(after[2:]) - sum(before[2:]),
        sent=sent,
        remaining=0,
        ms=_ms(seconds),
        mbps=round(sent * 8 / 1e6 / max(seconds, 1e-6), 1),
        dirty_rate=0,
        cpu_throttle_percentage=source.throttle.percentage if source.throttle else 0,
        switch_over=source.touched,
    )


def report_destination(source: Source) -> None:
    """Report the huge pages at the destination. Maps that do not match our regions are ignored."""
    if source.report is None or len(source.report.units) != len(source.memory.regions):
        return
    with contextlib.suppress(ValueError):
        units = [
            messages.unpack_units(packed, len(ours))
            for packed, ours in zip(source.report.units, source.large, strict=True)
        ]
        _report_large_pages(source, "destination", units)


def _report_large_pages(source: Source, side: Literal["source", "destination"], units: Sequence[list[bool]]) -> None:
    maps = [
        events.LargeMap.of(region.name, region.length, large)
        for region, large in zip(source.memory.regions, units, strict=True)
    ]
    source.listener(events.LargePagesEvent(side=side, regions=maps))


def result_of(source: Source, running: messages.Running) -> events.MigrationResult:
    """Return the result of a completed migration."""
    times, ready, report = source.times.milliseconds, source.ready, source.report
    transferred, _, data, zero, absent = source.sender.progress
    if source.service is not None:
        late = source.service.counters
        transferred, data, zero, absent = transferred + late[0], data + late[2], zero + late[3], absent + late[4]
    populated = report.populated if report else ready.populated
    return events.MigrationResult(
        status="completed",
        mode=source.options.mode,
        workload=source.workload.name,
        peer=source.peer,
        paused=source.stays_paused,
        total_time=times("total"),
        phases=source.times.phase_milliseconds(),
        setup_time=times("setup"),
        downtime=times("downtime"),
        downtime_parts=events.Downtime(
            total=times("downtime"),
            stop=times("stop"),
            last_pages=times("last pages"),
            device_state=_ms(source.times.seconds("save") + ready.load),
            populate=_ms(ready.populate),
            resume=_ms(running.resume),
        ),
        transferred=transferred,
        memory=source.memory.size,
        normal=data,
        duplicate=zero,
        skipped=absent,
        dirty_sync_count=source.collections,
        cpu_throttle_percentage=source.throttle.highest if source.throttle else 0,
        mbps=round(transferred * 8 / 1e3 / times("total"), 1),
        large_pages=events.LargePageCount(
            source=sum(map(sum, source.large)),
            destination=report.large_pages if report else 0,
            fallbacks=report.fallbacks if report else 0,
        ),
        populated=events.PopulateCount(
            mode=source.options.populate,
            large=populated.large,
            small=populated.small,
            failed=populated.failed,
            work_ms=_ms(populated.seconds),
        ),
        faults_after_resume=events.FaultCount(minor=report.minor_faults, major=report.major_faults) if report else None,
        trace=events.TraceCount(
            granularity=source.options.trace_granularity,
            install_ms=_ms(source.install_seconds),
            released_units=source.released_units,
        ),
        direct_io=events.DirectIo(
            drains=source.drains.count,
            time=_ms(source.drains.seconds),
            longest=_ms(source.drains.longest),
            pinned_pages=source.pinned,
        ),
        postcopy_requests=source.service.requests if source.service else 0,
        postcopy=_postcopy_count(source),
    )


def _postcopy_count(source: Source) -> events.PostcopyCount | None:
    if source.service is None or (arrived := source.arrived) is None:
        return None
    return events.PostcopyCount(
        time=source.times.milliseconds("postcopy"),
        pages=source.service.pages,
        faults=arrived.requests,
        service_us=round(arrived.service / max(arrived.requests, 1) * 1e6, 1),
        waits=Latency.of(arrived.waits, round(arrived.longest * 1e6, 1)),
    )


OWN_LIMIT = 1.25
"""The user's bandwidth limit is reported as the cause if it is at most this many times the measured rate."""


def not_converging(source: Source, remaining: int, seconds: float) -> NotConverging:
    """Return the error for a migration that does not converge, after a round of `seconds` that left `remaining`
    bytes."""
    expected = source.convergence.expected_downtime(remaining)
    slower = "" if source.options.auto_converge else ", throttle the workload with `auto_converge`"
    rate = source.convergence.bandwidth
    limit = source.options.bandwidth
    own = 0 < limit <= OWN_LIMIT * rate
    taken = f"`bandwidth` allows {limit / 2**20:.0f}" if own else f"{source.peer} takes {rate / 2**20:.0f}"
    faster = "Raise `bandwidth`, allow" if own else "Allow"
    return NotConverging(
        f"migration of {source.workload.name} does not converge: it modifies {remaining / seconds / 2**20:.0f} MiB/s "
        f"and {taken} MiB/s; {remaining >> 20} MiB remain after {source.convergence.rounds} rounds. It is still "
        f"running on this host. {faster} `max_downtime` {expected * 1e3:.0f}ms{slower}, or use post-copy with "
        f"`mode` hybrid"
    )


def _ms(seconds: float) -> float:
    """Convert to milliseconds, rounded to the microsecond."""
    return round(seconds * 1e3, 3)
