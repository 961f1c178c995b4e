"""Job of a source, and the session with its destination that the phases of the migration share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from pageferry._engine import BlockSender
from pageferry.errors import WorkloadError
from pageferry.events import Listener, ignore
from pageferry.host.registry import Folder
from pageferry.migration.disk_source import DiskSource
from pageferry.migration.options import Options
from pageferry.migration.page_service import PageService
from pageferry.migration.source_memory import SourceMemory
from pageferry.migration.statistics import MigrationStatistics
from pageferry.migration.throttle import Throttle
from pageferry.migration.transport import messages
from pageferry.migration.transport.addresses import Address
from pageferry.migration.transport.channel import REASON_TIMEOUT, Channel
from pageferry.migration.transport.connection import PageStream, connect_streams
from pageferry.migration.transport.tls import Trust
from pageferry.migration.write_trace import WriteTrace
from pageferry.workloads.deferred_access import AcquiredPager
from pageferry.workloads.direct_io import Drains
from pageferry.workloads.protocols import Migratable

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Migration of one workload, as it was requested."""

    workload: Migratable
    options: Options
    listener: Listener = ignore
    folder: Folder | None = None
    """Directory for the durable records of the workload; None for a workload without a name."""
    trust: Trust | None = None
    """Certificates that authenticate the destination; None without TLS."""
    hold: AcquiredPager | None = None
    """Acquired pager of a workload with deferred memory, released by the caller."""
    migration: str = field(default_factory=lambda: os.urandom(16).hex())
    """Identifier of the migration."""


@dataclass(frozen=True, slots=True)
class Link:
    """Connections to the destination."""

    channel: Channel
    sender: BlockSender
    """Sender over the page streams."""
    postcopy: list[PageStream]
    """Post-copy streams, for pages that are sent after the switch-over; none in pre-copy."""
    hostname: str
    """Host name expected in the certificate of the destination."""


async def open_link(options: Options, channel: Channel, address: Address, token: bytes) -> Link:
    """Connect the streams of a migration that the destination has accepted. Raises MigrationError."""
    count = options.streams
    streams = await connect_streams(channel, address, token, range(count))
    try:
        sender = BlockSender(
            [stream.handle for stream in streams],
            codec=options.codec,
            timeout=options.timeout,
            bandwidth=options.bandwidth,
            adaptive=options.adaptive,
        )
    finally:
        for stream in streams:  # the engine has duplicated the descriptors
            stream.close()
    postcopy: list[PageStream] = []
    if options.mode != "precopy":
        postcopy = await connect_streams(channel, address, token, range(count, 2 * count + 1))
    return Link(channel, sender, postcopy, options.tls_hostname or address.name)


class Session:
    """Migration that is connected to its destination: the memory of the workload, its traces, and the connections."""

    def __init__(
        self, job: Job, memory: SourceMemory, link: Link, hello: messages.Hello, statistics: MigrationStatistics
    ) -> None:
        self.job = job
        self.memory = memory
        self.link = link
        self.hello = hello
        """Description of the workload that the destination has accepted."""
        self.statistics = statistics
        self.deferred: AcquiredPager | None = job.hold
        """Pager that has to load pages before they are sent; None once all pages are loaded."""
        self.trace: WriteTrace | None = None
        """Write traces; None in `postcopy` mode, in which no page is sent while the workload runs at the source."""
        self.throttle: Throttle | None = None
        """CPU throttle of the workload; None without `auto_converge`."""
        self.service: PageService | None = None
        """Service of the missing pages, once the migration has switched to post-copy."""
        self.disks: DiskSource | None = None
        """Copies of the disks; None if no disk is copied."""

    @property
    def channel(self) -> Channel:
        """Control connection."""
        return self.link.channel

    @property
    def drains(self) -> Drains:
        """Drains of direct I/O."""
        return self.statistics.drains

    async def drain(self) -> None:
        """Complete I/O that had pinned pages before the last collection, so that the data sent include its writes."""
        if self.disks is None or not self.drains.due or not await self.job.workload.does_direct_io():
            await self.channel.during(self.drains.drain_if_due())
            return
        async with self.disks.quiet():
            await self.channel.during(self.drains.drain_if_due())

    async def beside_disks(self, work: Awaitable[T]) -> T:
        """Return the result of `work`. If the copy of a disk fails first, cancel `work`, and raise the error."""
        if self.disks is None:
            return await work
        try:
            return await self.disks.during(work)
        except WorkloadError:
            await asyncio.sleep(REASON_TIMEOUT)  # the cause may be a lost link, or an Abort of the peer
            if self.channel.failure is not None:
                raise self.channel.failure from None
            raise

    async def disks_copied(self, bandwidth: float = 0.0) -> None:
        """Wait until all disks have been copied once, and the remaining writes can be sent in the pause. `bandwidth`:
        see `DiskSource.rest`. Raises NotConverging."""
        if self.disks is not None:
            times = self.statistics.times
            times.phase("disks")
            await self.channel.during(self.disks.wait_small(bandwidth))
            times.phase("copy")

    async def end_throttle(self) -> None:
        """Remove the CPU limit of the workload permanently."""
        if self.throttle is not None:
            await self.throttle.close()

    async def remove_trace(self) -> None:
        """Remove the write traces."""
        if self.trace is not None:
            await self.trace.remove()

    def stop_service(self) -> None:
        """Stop serving missing pages."""
        if self.service is not None:
            self.service.close()

    def close(self) -> None:
        """Stop the page service, close the post-copy streams, and release the objects of the engine at once: an
        exception may keep a reference to this object."""
        self.stop_service()
        if self.disks is not None:
            self.disks.close()
        for stream in self.link.postcopy:
            stream.close()
        del self.memory, self.link, self.service, self.trace
