"""Disks that the source of a migration copies to this host (`copy_disks`).

The waiting workload exports its own, empty disks on local sockets. A relay of the engine connects each socket to a
connection of the source. The exports end before the state is loaded, so nothing writes to the disks from then on except
the workload.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from logging import getLogger

from pageferry._engine import Relay
from pageferry.errors import ConnectionLost, PageferryError
from pageferry.host.blocking import in_thread
from pageferry.host.fault_points import fault_point
from pageferry.migration.incoming import Incoming
from pageferry.migration.transport.connection import PageStream
from pageferry.workloads.disk_copies import CopiesDisks, DiskExports
from pageferry.workloads.protocols import COPIED

log = getLogger(__name__)

_FLUSH_INTERVAL = 0.2
"""Seconds between two flushes of the disks. A flush takes longer while the storage is busy."""
_POLL = 0.001
"""Interval of checks whether the source has closed its connections, seconds."""


class ReceivedDisks:
    """Disks that are received. `open` returns an instance."""

    def __init__(self, exports: DiskExports) -> None:
        self._exports = exports
        self._relays: list[Relay] = []
        self._flushing: asyncio.Task[None] | None = None
        """Task that flushes the disks while the workload runs at the source."""

    @classmethod
    async def open(cls, incoming: Incoming) -> ReceivedDisks | None:
        """Export the disks that the source copies; return None if it copies none. Raises WorkloadError."""
        workload = incoming.workload
        if incoming.hello.details.get(COPIED) is not True or not isinstance(workload, CopiesDisks):
            return None
        received = cls(workload.disk_exports())
        await received._exports.open()
        fault_point("destination.disks-exported")
        return received

    @property
    def numbers(self) -> list[int]:
        """Indexes of the disks that the source copies."""
        return list(self._exports.numbers)

    async def receive(self, streams: Sequence[PageStream]) -> None:
        """Start to receive over these connections, one per disk. Raises WorkloadError."""
        with contextlib.ExitStack() as opened:
            for connection, stream in zip(await self._exports.connect(), streams, strict=True):
                opened.enter_context(connection)  # the engine has duplicated the descriptors
                self._relays.append(Relay(connection.fileno(), stream.handle))
        self._start_flushing()

    def _start_flushing(self) -> None:
        self._flushing = asyncio.create_task(self._keep_flushed())

    async def _keep_flushed(self) -> None:
        """Flush the disks regularly while data is received. A copy ends with a flush of the disk while the workload is
        paused, and that flush takes as long as the storage needs to write all data that is only in the page cache."""
        flushed = 0
        while True:
            await asyncio.sleep(_FLUSH_INTERVAL)
            if (now := self.transferred()) > flushed:
                await self._exports.flush()
                flushed = now

    def transferred(self) -> int:
        """Return the number of bytes that the relays have carried, in both directions."""
        return sum(relay.received + relay.sent for relay in self._relays)

    async def complete(self, timeout: float) -> None:
        """Wait until the source has closed its connections, and end the exports. Called when the source has completed
        its copies. Raises WorkloadError, ConnectionLost."""
        self._stop_flushing()
        try:
            async with asyncio.timeout(timeout):
                for relay in self._relays:
                    await _ended(relay)
        except TimeoutError as late:
            raise ConnectionLost(
                f"cannot complete the copies of disks: the source has not closed its connections within {timeout:g} s"
            ) from late
        await self._exports.close()
        fault_point("destination.disks-closed")

    async def abandon(self) -> None:
        """Close the connections, and log a warning that names the disks with incomplete copies."""
        self._stop_flushing()
        await in_thread(self.close)
        with contextlib.suppress(PageferryError):
            await self._exports.close()
        if self._exports.disks:
            names = ", ".join(disk.path for disk in self._exports.disks)
            log.warning(
                "the workload keeps its disks at the source; these images on this host contain an incomplete copy, and "
                "can be removed: %s",
                names,
            )

    async def end_flush(self) -> None:
        """Stop flushing the disks, and wait until a flush in progress has ended."""
        self._stop_flushing()
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)

    def _stop_flushing(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()

    def close(self) -> None:
        """Close the connections."""
        for relay in self._relays:
            relay.close()


async def _ended(relay: Relay) -> None:
    while True:
        if relay.ended:
            return
        await asyncio.sleep(_POLL)
