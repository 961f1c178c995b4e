"""Post-copy at the source: sends the pages that the workload, which runs at the destination, still lacks.

The workload is paused here, so its memory is unchanged since the hand-over. Requests are served at once, on a separate
connection; all other pages are pushed over the others, onwards from the last requested page. The source keeps all pages
until the destination has sent `Arrived`. If the link is lost before, `serve_on` continues over a new one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from pageferry._engine import PageServer, PageSet
from pageferry.errors import PageferryError, PostcopyPaused
from pageferry.events import Listener, ignore
from pageferry.host.fault_points import fault_point
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.migration import events
from pageferry.migration.engine_call import Counters, off_loop
from pageferry.migration.missing_pages import receive_missing
from pageferry.migration.ownership import Committed
from pageferry.migration.transport import messages
from pageferry.migration.transport.addresses import Address
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import PageStream, connect_streams
from pageferry.workloads.protocols import Migratable

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
    """Sends the `missing` pages of a paused workload over the `late` connections, the first of which is for
    requests."""

    def __init__(
        self,
        memory: Memory,
        missing: Sequence[PageSet],
        late: Sequence[PageStream],
        sending: Sending,
        timeout: float,
    ) -> None:
        self.pages = sum(map(len, missing))
        urgent, *streams = [connection.handle for connection in late]
        # The engine duplicates the descriptors, and keeps the mappings.
        self._server = PageServer(
            memory.mappings,
            missing,
            urgent,
            streams,
            sending.codec,
            timeout=timeout,
            bandwidth=sending.bandwidth,
            adaptive=sending.adaptive,
        )

    @property
    def counters(self) -> Counters:
        """Counters of the pages sent so far."""
        return self._server.progress

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
            mbps=round(mbps, 1),
        )

    def start(self) -> None:
        """Start to serve requests. Pages are pushed only by `send_all`: the workload does not run yet."""
        self._server.start()

    async def send_all(self, channel: Channel, listener: Listener) -> messages.Arrived:
        """Push the remaining pages until the destination has all. Raises MigrationError, WorkloadError."""
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
        begin, since = self.counters[0], time.perf_counter()
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            bits = (self.counters[0] - begin) * 8
            listener(self.event("postcopy-active", bits / 1e6 / (time.perf_counter() - since)))


async def serve_on(
    workload: Migratable,
    record: Committed,
    channel: Channel,
    address: Address,
    timeout: float,
    listener: Listener = ignore,
) -> messages.Arrived:
    """Send the pages that the destination lacks over new connections, after it has reported that it lacks some.

    Raises PostcopyPaused if this fails; it can be repeated.
    """
    late: list[PageStream] = []
    service: PageService | None = None
    try:
        memory = Memory(workload)
        await channel.send(messages.Serve(streams=record.streams))
        welcome = await channel.receive(messages.Welcome)
        late = await connect_streams(channel, address, welcome.token, range(1 + record.streams))
        missing = await receive_missing(channel, [region.length // SMALL_PAGE for region in memory.regions])
        service = PageService(memory, missing, late, record, timeout)
        listener(service.event("postcopy-recover"))
        service.start()
        fault_point("source.serves-again")
        return await service.send_all(channel, listener)
    except (PageferryError, OSError) as error:
        if service is not None:
            listener(service.event("postcopy-paused"))
        raise paused(workload.name, str(address), error) from error
    finally:
        if service is not None:
            service.close()
        for connection in late:
            connection.close()


def paused(name: str, peer: str, error: BaseException) -> PostcopyPaused:
    """Return the error for a link that is lost before all pages were sent."""
    return PostcopyPaused(
        f"{name} runs at {peer} and waits for its remaining memory: {str(error) or type(error).__name__}. This "
        f"host keeps it, paused; to send the remaining pages, run pageferry migrate {name} --recover"
    )
