"""Service of the pages that a workload at the destination still lacks (post-copy).

Requested pages are sent at once, over a separate connection. All other pages are pushed over the other connections, in
order, starting at the last requested page.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from pageferry._engine import PageServer, PageSet
from pageferry.events import Listener
from pageferry.host.fault_points import fault_point
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.migration import events
from pageferry.migration.engine_call import off_loop
from pageferry.migration.statistics import Counters, megabits
from pageferry.migration.transport import messages
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import PageStream

PROGRESS_INTERVAL = 0.2
"""Seconds between progress events."""


class Sending(Protocol):
    """Parameters for sending pages: `Options`, or `Committed`."""

    @property
    def codec(self) -> messages.Codec:
        """Compression of storage blocks."""

    @property
    def bandwidth(self) -> int:
        """Bandwidth limit, bytes per second; 0 for none."""

    @property
    def adaptive(self) -> bool:
        """Whether to send uncompressed while the link is faster than the codec."""


class PageService:
    """Service that sends the `missing` pages of a paused workload over `connections`, the first of which is for
    requests."""

    def __init__(
        self,
        memory: Memory,
        missing: Sequence[PageSet],
        connections: Sequence[PageStream],
        sending: Sending,
        timeout: float,
    ) -> None:
        self.pages = sum(map(len, missing))
        urgent, *streams = [connection.handle for connection in connections]
        # The engine duplicates the descriptors, and keeps the mappings.
        self._server = PageServer(
            memory.mappings,
            missing,
            urgent,
            streams,
            codec=sending.codec,
            timeout=timeout,
            bandwidth=sending.bandwidth,
            adaptive=sending.adaptive,
        )

    @property
    def counters(self) -> Counters:
        """Counters of the pages sent so far."""
        return Counters.of(self._server.progress)

    @property
    def requests(self) -> int:
        """Number of requests received from the destination."""
        return self._server.requests

    def event(self, status: events.PostcopyStatus, mbps: float = 0.0) -> events.PostcopyEvent:
        """Return an event with the current progress."""
        return events.PostcopyEvent(
            status=status,
            remaining=self._server.remaining * SMALL_PAGE,
            postcopy_requests=self._server.requests,
            mbps=mbps,
        )

    def start(self) -> None:
        """Start to serve requests. Only `send_all` pushes pages, because the workload is not running at the destination
        yet."""
        self._server.start()

    async def send_all(self, channel: Channel, listener: Listener) -> messages.Arrived:
        """Push the remaining pages until the destination has all of them. Return its report of the completion. Raises
        MigrationError, WorkloadError."""
        reporting = asyncio.create_task(self._report_progress(listener))
        try:
            await channel.during(off_loop(self._server.push, cancel=self._server.cancel))
            fault_point("source.pushed")
            return await channel.receive(messages.Arrived)
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)

    def close(self) -> None:
        """Stop serving requests."""
        self._server.cancel()

    async def _report_progress(self, listener: Listener) -> None:
        begin, since = self.counters, time.perf_counter()
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            sent = self.counters.since(begin).sent
            listener(self.event("postcopy-active", megabits(sent, time.perf_counter() - since)))
