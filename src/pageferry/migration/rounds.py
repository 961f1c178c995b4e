"""Rounds at the source: each sends pages, waits until the destination has placed them, and is reported."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from pageferry._engine import PageSet
from pageferry.errors import ProtocolError
from pageferry.host.fault_points import fault_point
from pageferry.memory.regions import SMALL_PAGE
from pageferry.migration import events
from pageferry.migration.deferred_pages import part_of, send_deferred
from pageferry.migration.engine_call import off_loop
from pageferry.migration.session import Session
from pageferry.migration.statistics import Counters, megabits, milliseconds
from pageferry.migration.transport import messages

CHUNKS = 8
"""Number of chunks into which the memory is divided for a round that may stop early. `MIN_CHUNK` and `MAX_CHUNK` limit
their size."""
MIN_CHUNK, MAX_CHUNK = (16 << 20) // SMALL_PAGE, (256 << 20) // SMALL_PAGE
"""Bounds of the size of a chunk, pages: 16 MiB (each chunk costs a round trip) and 256 MiB."""
PROGRESS_INTERVAL = 0.2
"""Seconds between progress events."""


@dataclass
class Round:
    """Round of a migration: its pages, and the figures for its event."""

    number: int
    total: int
    """Number of pages to send."""
    left: list[PageSet]
    """Pages that have not been sent."""
    before: Counters
    """Counters of the streams at the start of the round."""
    drained: float
    """Total time of drains at the start of the round, seconds."""
    throttle: int
    """Throttle percentage during the round."""
    switch_over: bool = False
    """Whether the round belongs to the switch-over."""
    postcopy: bool = False
    """Whether the round was sent after the switch-over."""
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    """Duration without drains, seconds. Drains are excluded because the duration predicts that of the last pages, which
    are sent without a drain."""
    transferred: Counters = field(default_factory=Counters)
    remaining: int = 0
    """Number of pages left to send after the round."""
    modified: int = 0
    """Number of pages modified during the round."""

    def event(self) -> events.RoundEvent:
        """Return the event of the round."""
        return events.RoundEvent(
            round=self.number,
            pages=self.transferred.pages,
            sent=self.transferred.sent,
            remaining=self.remaining * SMALL_PAGE,
            ms=milliseconds(self.seconds),
            mbps=megabits(self.transferred.sent, self.seconds),
            dirty_rate=round(self.modified * SMALL_PAGE / self.seconds),
            cpu_throttle_percentage=self.throttle,
            switch_over=self.switch_over,
            postcopy=self.postcopy,
        )


class Rounds:
    """Rounds of a migration in all of its phases: sends, counts and reports them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._number = 0
        self._exchanges = 0
        """Number of Round messages sent so far. A round in chunks has several."""

    async def send(self, pages: list[PageSet], stop_early: Callable[[Round], Awaitable[bool]] | None = None) -> Round:
        """Send these pages as the next round. With `stop_early`, send them in chunks, and end the round after the first
        chunk for which `stop_early` returns True; the pages not sent remain in `left`."""
        sent = self.begin(self._progress, pages)
        await self._session.drain()
        reporting = asyncio.create_task(self._report_progress(sent))
        try:
            for chunk in self._chunks(pages) if stop_early else iter((pages,)):
                await self._send_chunk(chunk)
                subtract(sent.left, chunk)
                if stop_early and any(sent.left) and await stop_early(sent):
                    break
        finally:
            reporting.cancel()
            (end,) = await asyncio.gather(reporting, return_exceptions=True)
        if isinstance(end, Exception):
            raise end
        self.end(sent, self._progress)
        return sent

    def begin(self, before: Counters, pages: list[PageSet]) -> Round:
        """Return a new round of these pages. `before`: counters of the streams at its start."""
        self._number += 1
        session = self._session
        return Round(
            number=self._number,
            total=count(pages),
            left=[region.copy() for region in pages],
            before=before,
            drained=session.drains.seconds,
            throttle=session.throttle.percentage if session.throttle else 0,
        )

    def end(self, sent: Round, after: Counters) -> None:
        """Record the counters and the duration of a completed round. `after`: counters of the streams at its end."""
        sent.transferred = after.since(sent.before)
        statistics = self._session.statistics
        statistics.transferred = statistics.transferred.plus(sent.transferred)
        self.measure(sent)

    def measure(self, sent: Round) -> None:
        """Set the duration of a round to the time since its start, without drains."""
        drained = self._session.drains.seconds - sent.drained
        sent.seconds = time.perf_counter() - sent.started - drained

    def report(self, sent: Round) -> None:
        """Report a round to the listener. Never call this while the workload is paused: the listener may block."""
        self._session.job.listener(sent.event())

    @property
    def _progress(self) -> Counters:
        return Counters.of(self._session.link.sender.progress)

    def _chunks(self, pages: list[PageSet]) -> Iterator[list[PageSet]]:
        memory = self._session.memory
        none = memory.page_sets()
        size = min(max(memory.size // SMALL_PAGE // CHUNKS, MIN_CHUNK), MAX_CHUNK)
        for number, region in enumerate(pages):
            for start in range(0, region.pages, size):
                chunk = part_of(region, start, size)
                if chunk:
                    yield [*none[:number], chunk, *none[number + 1 :]]

    async def _send_chunk(self, pages: list[PageSet]) -> None:
        session, channel = self._session, self._session.channel
        self._exchanges += 1
        number, sender, mappings = self._exchanges, session.link.sender, session.memory.mappings
        await channel.send(messages.Round(number=number))
        fault_point("source.in-round")
        if session.deferred is not None:
            await channel.during(send_deferred(session.deferred, sender, mappings, pages, number))
        else:
            await channel.during(off_loop(lambda: sender.send(mappings, pages, number), cancel=sender.cancel))
        done = await channel.receive(messages.RoundDone)
        if done.number != number:
            raise ProtocolError(f"the peer finished round {done.number}, expected {number}")

    async def _report_progress(self, sent: Round) -> None:
        """Report the progress of a round until cancelled."""
        since = time.perf_counter()
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            now = self._progress.since(sent.before)
            mbps = megabits(now.sent, time.perf_counter() - since)
            self._session.job.listener(
                events.ProgressEvent(round=sent.number, done=now.pages, total=sent.total, mbps=mbps)
            )


def count(sets: list[PageSet]) -> int:
    """Return the number of pages in these sets."""
    return sum(len(pages) for pages in sets)


def union(sets: list[PageSet], others: list[PageSet]) -> list[PageSet]:
    """Add the pages of `others` to `sets`, and return `sets`."""
    for pages, more in zip(sets, others, strict=True):
        pages.update(more)
    return sets


def subtract(sets: list[PageSet], others: list[PageSet]) -> None:
    """Remove the pages of `others` from `sets`."""
    for pages, fewer in zip(sets, others, strict=True):
        pages.subtract(fewer)
