"""Post-copy at the source: sends the pages that the workload, which runs at the destination, still lacks.

The workload is paused at the source, so its memory has not changed since the hand-over. The source keeps all pages
until the destination has sent `Arrived`. If the link is lost before then, `serve_on` continues over a new one.
"""

from __future__ import annotations

import contextlib
from logging import getLogger

from pageferry.errors import PageferryError, PostcopyPaused
from pageferry.events import Listener, ignore
from pageferry.host.blocking import ignoring_cancellation
from pageferry.host.fault_points import fault_point
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.migration.missing_pages import receive_missing
from pageferry.migration.ownership import Committed
from pageferry.migration.page_service import PageService
from pageferry.migration.rounds import Rounds
from pageferry.migration.session import Session
from pageferry.migration.statistics import Counters
from pageferry.migration.transport import messages
from pageferry.migration.transport.addresses import Address
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import PageStream, connect_streams
from pageferry.workloads.protocols import Migratable

log = getLogger(__name__)


class Postcopy:
    """Phase after the switch-over: the missing pages are pushed in the background and sent on request."""

    def __init__(self, session: Session, service: PageService, rounds: Rounds) -> None:
        self._session = session
        self._service = service
        self._rounds = rounds

    async def run(self) -> None:
        """Send the missing pages until the destination has all of them. Raises PostcopyPaused if this fails; the source
        then keeps all pages."""
        session, service, statistics = self._session, self._service, self._session.statistics
        sent = self._rounds.begin(Counters(), [])
        sent.postcopy = sent.switch_over = True
        try:
            with statistics.times.measure("postcopy"):
                statistics.arrived = await service.send_all(session.channel, session.job.listener)
        except BaseException as error:
            await ignoring_cancellation(self._keep_pages())
            lost = paused(session.job.workload.name, statistics.peer, error)
            if isinstance(error, PageferryError):
                raise lost from error
            log.warning("%s", lost)
            raise
        fault_point("source.arrived")
        statistics.postcopy_pages, statistics.postcopy_requests = service.pages, service.requests
        self._rounds.end(sent, service.counters)
        self._rounds.report(sent)

    async def _keep_pages(self) -> None:
        """Report that post-copy is paused, remove the write traces, and close the connections. The source keeps the
        pages."""
        self._session.job.listener(self._service.event("postcopy-paused"))
        with contextlib.suppress(PageferryError):
            await self._session.remove_trace()
        self._service.close()
        await self._session.channel.close()


async def serve_on(
    workload: Migratable,
    record: Committed,
    channel: Channel,
    address: Address,
    timeout: float,
    listener: Listener = ignore,
) -> messages.Arrived:
    """Over new connections, send the pages that the destination lacks, once its Outcome has reported that pages are
    missing. Return the destination's report of the completion.

    Raises PostcopyPaused if this fails; the call can be repeated.
    """
    streams: list[PageStream] = []
    service: PageService | None = None
    try:
        memory = Memory(workload)
        await channel.send(messages.Serve(streams=record.streams))
        welcome = await channel.receive(messages.Welcome)
        streams = await connect_streams(channel, address, welcome.token, range(1 + record.streams))
        missing = await receive_missing(channel, [region.length // SMALL_PAGE for region in memory.regions])
        service = PageService(memory, missing, streams, record, timeout)
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
        for connection in streams:
            connection.close()


def paused(name: str, peer: str, error: BaseException) -> PostcopyPaused:
    """Return the error for a link that was lost before all pages were sent."""
    return PostcopyPaused(
        f"{name} runs at {peer} and waits for its remaining memory: {str(error) or type(error).__name__}. This "
        f"host keeps the remaining pages; to send them, run pageferry migrate {name} --recover"
    )
