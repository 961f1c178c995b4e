"""Post-copy at the destination: the workload runs before its pages are received, and a pager fetches them from the
source.

A deferred bitmap marks the missing pages. An access to a missing page waits until the pager has requested and received
it; the source pushes all other pages. The bitmap and the workload's userfaultfd outlive this process (`pager.records`).
If this process is killed, another process can take over: see `Resumption`. While there is no link, accesses to missing
pages wait; the workload never reads wrong contents.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from logging import getLogger
from typing import Literal

import msgspec

from pageferry._engine import Mapping, Pager, PageSet, PeerSource, TargetRegion
from pageferry.errors import PageferryError, UsageError, WorkloadDied
from pageferry.host.blocking import in_thread
from pageferry.host.cgroups import join_groups_of
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder
from pageferry.memory.regions import SMALL_PAGE, Region
from pageferry.memory.view import mapped, numbered
from pageferry.migration import events
from pageferry.migration.engine_call import off_loop
from pageferry.migration.incoming import ReceivingHost
from pageferry.migration.missing_pages import send_missing
from pageferry.migration.recovery_server import RecoveryServer
from pageferry.migration.transport import messages
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import ConnectionListener, PageStream
from pageferry.pager import records
from pageferry.pager.records import PostcopyRecord
from pageferry.pager.service import PagerService

log = getLogger(__name__)

POLL_INTERVAL = 0.05
"""Interval of checks of the link and the workload, seconds."""
EVENT_INTERVAL = 0.5
"""Interval of events, seconds."""


class PostcopyMemory:
    """Memory of one workload, and the fetching of its missing pages. `begin` starts the fetching, or `reconnect` if the
    workload is already running.

    The constructor raises CannotHandleFaults, ProcessLookupError.
    """

    def __init__(self, record: PostcopyRecord, regions: Sequence[Region], host: ReceivingHost) -> None:
        self.record = record
        self.folder = host.folder()
        self.host = host
        self.service = PagerService(regions, self.folder)
        self._mappings = [Mapping(region.fd, region.length, region.file_offset) for region in regions]
        self._begun = time.monotonic()
        self._arrived: messages.Arrived | None = None
        """Report of the completion; None while pages are missing."""
        self._source: PeerSource | None = None
        self._channel: Channel | None = None
        self._linked = asyncio.Event()

    @property
    def name(self) -> str:
        """Name of the workload."""
        return self.folder.name if self.folder is not None else self.record.source

    # -- the first link

    async def begin(self, missing: Sequence[PageSet], streams: Sequence[PageStream], channel: Channel) -> None:
        """Start the pager, so that accesses to missing pages wait until the pages are received. The workload is not
        running yet.

        `streams`: post-copy streams, the first one for requests. Raises UnsupportedError, WorkloadError.
        """
        self._channel = channel
        self._linked.set()
        self._source = source = self._peer(streams)

        def make(userfaults: dict[int, int], flags: int) -> Pager:
            Pager.set_flags(flags, missing)
            return self._make_pager(source, userfaults, flags, "kept")

        await off_loop(lambda: self.service.start(make))
        self.record = msgspec.structs.replace(self.record, userfaults=self.service.userfaults)
        if self.folder is not None:
            # The record is stored only after the pager has set the bitmap: a record with an empty bitmap would mean
            # that all pages are present.
            self.folder.store(records.POSTCOPY, self.record, synced=False)
        self._serve()

    async def _take_over(self, streams: Sequence[PageStream]) -> None:
        """Start a pager that takes over from one that was killed."""
        self._source = source = self._peer(streams)
        start = self.service.start
        await off_loop(
            lambda: start(
                lambda ours, flags: self._make_pager(source, ours, flags, "taken-over"), self.record.userfaults
            )
        )
        self._serve()

    def _make_pager(
        self, source: PeerSource, userfaults: dict[int, int], flags: int, begin: Literal["kept", "taken-over"]
    ) -> Pager:
        return Pager(
            source,
            self._targets(),
            mapped(self.service.spaces, numbered(self.service.regions)),
            userfaults,
            flags,
            begin=begin,
            checks_removals=os.getpid() in self.service.spaces,
        )

    def _peer(self, connected: Sequence[PageStream]) -> PeerSource:
        urgent, *streams = [connection.handle for connection in connected]
        return PeerSource(urgent, streams, timeout=self.host.timeout)

    def _targets(self) -> list[TargetRegion]:
        return [
            TargetRegion(mapping, region.page_size, messages.unpack_units(packed, len(packed) * 8))
            for mapping, region, packed in zip(self._mappings, self.service.regions, self.record.large, strict=True)
        ]

    def _serve(self) -> None:
        self.service.serve(f"the source of {self.record.source}")

    async def populate(self) -> None:
        """Map the present pages before the workload runs (S1, S5)."""
        await off_loop(self._pager.populate)

    # -- further links

    async def reconnect(self, channel: Channel, connections: ConnectionListener) -> None:
        """Continue with new connections from the source, regardless of the state of the old ones. Raises
        MigrationError."""
        serve = await channel.receive(messages.Serve)
        token = os.urandom(messages.TOKEN_BYTES)
        connections.expect(token, channel)
        await channel.send(messages.Welcome(token=token))
        streams = await channel.during(connections.streams(token, 1 + serve.streams, self.host.timeout))
        try:
            if self.service.started:
                source = self._peer(streams)
                await off_loop(lambda: self._pager.reconnect(source))
                self._source = source
            else:
                await self._take_over(streams)
        finally:
            for connection in streams:
                connection.close()
        pager = self._pager
        missing = await off_loop(lambda: [pager.missing(number) for number in range(len(self.service.regions))])
        await send_missing(channel, missing)
        fault_point("destination.relinked")
        channel.limit = messages.MAX_MESSAGE
        before, self._channel = self._channel, channel
        self._report_link(None)
        self._linked.set()
        if before is not None:
            await before.close()

    # -- until all pages are present

    async def wait_complete(self) -> Channel:
        """Wait until every page is present, over any number of links, and return the channel of the last link.

        Raises WorkloadDied if the workload has exited.
        """
        while True:
            await self._link()
            channel = self._channel
            assert channel is not None
            if (why := await self._finished_or_lost(channel)) is None:
                await self._finish()
                return channel
            if channel is self._channel:
                self._linked.clear()
                self._report_link(f"the link to the source is lost ({why})")
                self._report_progress("postcopy-paused")
                log.warning(
                    "%s: waiting for memory from its source: connection lost (%s); at the source, run pageferry "
                    "migrate %s --recover",
                    self.name,
                    why,
                    self.record.source,
                )

    def _report_link(self, paused: str | None) -> None:
        """Set the reason for which no pages are received, for clients of the pager; None if pages are received."""
        if self.service.server is not None:
            self.service.server.paused = paused

    async def _link(self) -> None:
        """Wait until there is a link."""
        while not self._linked.is_set():
            self._check_workload()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVENT_INTERVAL):
                    await self._linked.wait()

    async def _finished_or_lost(self, channel: Channel) -> str | None:
        """Return None once all pages are present, or the reason for which the link was lost."""
        pager, reported = self._pager, 0.0
        while not await off_loop(lambda: pager.wait(POLL_INTERVAL, len(pager.failures))):
            self._check_workload()
            if channel is not self._channel:
                return "another one has replaced it"
            lost = (str(channel.failure) if channel.failure else None) or (self._source and self._source.lost)
            if lost:
                return lost
            if time.monotonic() - reported > EVENT_INTERVAL:
                reported = time.monotonic()
                self._report_progress("postcopy-active")
        return None

    def _check_workload(self) -> None:
        if self.service.started and not self._pager.pending:
            return  # the workload may have been migrated further
        if (pid := self.service.ended()) is not None:
            raise WorkloadDied(f"{self.name} (process {pid}) ended before all of its memory had been received")

    async def _finish(self) -> None:
        """Record durably that all pages are present, prepare the report, release the userfaultfds, and delete the other
        records."""
        fault_point("destination.all-here")
        seconds = time.monotonic() - self._begun
        self.host.decisions.arrive(self.record.migration)
        fault_point("destination.arrival-noted")
        counters = self._pager.counters
        self._arrived = messages.Arrived(
            requests=counters.faults,
            service=counters.service,
            longest=counters.longest,
            waits=self._pager.histogram,
            seconds=seconds,
        )
        await in_thread(self.service.release_userfaults)
        # The workload may have been migrated further, and another workload may have its name.
        if self.folder is not None and self._is_recorded(self.folder):
            self.service.forget(records.POSTCOPY)
        self.close()

    def _is_recorded(self, folder: Folder) -> bool:
        record = folder.load(records.POSTCOPY, PostcopyRecord)
        return record is not None and record.migration == self.record.migration

    def arrived(self) -> messages.Arrived:
        """Return the message that reports completion to the source, after `wait_complete`."""
        if self._arrived is None:
            raise RuntimeError("cannot report completion: pages are missing")
        return self._arrived

    def _report_progress(self, status: events.PostcopyStatus) -> None:
        self.host.listener(
            events.PostcopyEvent(
                status=status,
                remaining=self._pager.pending * SMALL_PAGE,
                postcopy_requests=self._pager.counters.missed,
                mbps=0.0,
            )
        )

    @property
    def _pager(self) -> Pager:
        return self.service.pager

    async def abandon(self) -> None:
        """Fail accesses to missing pages: the workload stays at the source, and the process that loads its state must
        not wait for pages that are never sent."""
        if self.service.started:
            await off_loop(self._pager.abandon)
        self.close()

    def close(self) -> None:
        """Stop fetching. Another process can take over and fetch the pages that are still missing."""
        self.service.close()


class Resumption:
    """Take-over of the missing pages of a workload whose receiver was killed: `pageferry receive --resume`.

    Raises UsageError if there is nothing to resume, or if another process resumes the workload. Also raises
    RestoreError and WorkloadError.
    """

    def __init__(self, folder: Folder, connections: ConnectionListener, host: ReceivingHost) -> None:
        record = folder.load(records.POSTCOPY, PostcopyRecord)
        if record is None:
            raise UsageError(
                f"cannot resume the reception of {folder.name}: its memory is complete, or is loaded from an image"
            )
        for failure in join_groups_of(record.regions[0].segments[0].pid):
            log.info("%s: memory is charged to the control group of this receiver: %s", folder.name, failure)
        self.memory = PostcopyMemory(record, [records.open_region(one) for one in record.regions], host)
        self.memory.service.take_bitmap(folder)
        self.recovery = RecoveryServer(connections, host.decisions)
        self.recovery.arrivals = self.memory

    async def run(self) -> None:
        """Fetch the missing pages, and report to the source that all pages are present. If the report fails, wait for a
        recovery request from the source. Raises WorkloadDied if the workload has exited."""
        self.recovery.begin(self.memory.record.migration)
        try:
            channel = await self.memory.wait_complete()
            try:
                await channel.send(self.memory.arrived())
                await channel.receive(messages.Done)
                self.memory.host.decisions.forget(self.memory.record.migration)
            except PageferryError as error:
                log.warning("%s: all memory received; the source may not know this: %s", self.memory.name, error)
                await self.recovery.wait_acknowledged(self.memory.host.timeout)
            finally:
                await channel.close()
        finally:
            self.recovery.close()
            self.memory.close()
