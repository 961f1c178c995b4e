"""Transfer at the destination: receives the pages and the device state while the workload belongs to the source."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from hashlib import blake2b

from pageferry.errors import ProtocolError
from pageferry.host.fault_points import fault_point
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.migration import preallocate
from pageferry.migration.engine_call import off_loop
from pageferry.migration.incoming import Incoming, ReceivingHost
from pageferry.migration.missing_pages import MissingPages
from pageferry.migration.placement import Placement, units_of
from pageferry.migration.postcopy_destination import PostcopyMemory
from pageferry.migration.transport import messages
from pageferry.migration.transport.connection import PageStream
from pageferry.pager import records
from pageferry.pager.records import PostcopyRecord
from pageferry.workloads.protocols import StateAhead


class DeviceState:
    """Device state, assembled from State messages."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._digest = blake2b(digest_size=32)
        self._only_ahead = True

    def add(self, message: messages.State) -> None:
        """Add the next chunk. Raises ProtocolError if the state becomes too long, or if a chunk to be loaded ahead
        follows one that is not."""
        if len(self._data) + len(message.data) > messages.MAX_STATE:
            raise ProtocolError(
                f"the peer sent more than {messages.MAX_STATE} bytes of device state, which is the limit"
            )
        if message.ahead and not self._only_ahead:
            raise ProtocolError("the peer sent a chunk of the state to be loaded ahead after one that is not")
        self._only_ahead = message.ahead
        self._data += message.data
        self._digest.update(message.data)

    def verified(self, end: messages.StateEnd) -> bytes:
        """Return the complete state. Raises ProtocolError if its length or digest differs from that in `end`."""
        if end.length != len(self._data) or end.digest != self._digest.digest():
            raise ProtocolError("cannot load the state of the workload: it was corrupted in transfer; retry")
        return bytes(self._data)


class Transfer:
    """Transfer of the pages and the device state, until both are complete. In post-copy, some pages remain missing."""

    def __init__(self, incoming: Incoming, placement: Placement, host: ReceivingHost) -> None:
        self.placement = placement
        self.hot: dict[int, list[int]] = {}
        """Indexes of the units that were modified during the migration, by region; empty if the source has not sent
        them."""
        self.missing = MissingPages([region.length // SMALL_PAGE for region in incoming.hello.regions])
        self.postcopy: PostcopyMemory | None = None
        """Memory with missing pages, and its pager; None unless post-copy has begun."""
        self._incoming = incoming
        self._host = host
        self._state = DeviceState()
        self._preparing: asyncio.Task[None] | None = None
        """Preparation for loading the state; None until the first round is complete."""

    async def run(self, streams: Sequence[PageStream]) -> bytes:
        """Receive all messages up to StateEnd, and return the device state. `streams`: post-copy streams.

        Raises MigrationError, WorkloadError.
        """
        while True:
            message = await self._incoming.receive()
            if isinstance(message, messages.StateEnd):
                state = self._verified(message)
                fault_point("destination.state-received")
                return state
            await self._handle(message)
            if self.missing.complete and self.postcopy is None:
                await self._start_postcopy(streams)

    async def _handle(self, message: messages.AnyMessage) -> None:
        match message:
            case messages.Round():
                await self._receive_round(message)
            case messages.Hot():
                units = units_of(self.placement.memory, message)
                self.hot[message.region] = [unit for unit, hot in enumerate(units) if hot]
            case messages.Missing():
                self.missing.add(message)
            case messages.State():
                self._state.add(message)
                if message.ahead:
                    await self._load_ahead(message.data)

    async def _load_ahead(self, chunk: bytes) -> None:
        """Load a chunk of the state, while the workload runs at the source."""
        workload = self._incoming.workload
        if not isinstance(workload, StateAhead):
            kind = workload.identity.kind
            raise ProtocolError(
                f"the peer sent state to be loaded ahead, which a workload of kind {kind} does not support"
            )
        await self.prepared()
        await self._incoming.channel.during(workload.load_ahead(chunk))

    async def _receive_round(self, message: messages.Round) -> None:
        fault_point("destination.in-round")
        receiver = self.placement.receiver
        await self._incoming.channel.during(off_loop(lambda: receiver.receive(message.number), cancel=receiver.cancel))
        await self.placement.finish_round()
        if self._preparing is None:
            # The preparation starts after the first round, which takes a long time, because it keeps the monitor of a
            # guest open. It does not start later, because any further round may be the last.
            self._preparing = asyncio.create_task(self._incoming.workload.prepare_load())
        await self._incoming.send(messages.RoundDone(number=message.number))

    def _verified(self, end: messages.StateEnd) -> bytes:
        state, absent = self._state.verified(end), self.placement.placer.missing
        if absent and self.postcopy is None:
            raise ProtocolError(f"cannot run the workload: the source has not sent {absent} pages")
        return state

    async def _start_postcopy(self, streams: Sequence[PageStream]) -> None:
        """Start the pager (post-copy): from here on, accesses to missing pages wait until the pages are received."""
        placement, memory = self.placement, self.placement.memory
        assert isinstance(memory, Memory), "clones are received in pre-copy mode"
        await off_loop(lambda: placement.placer.finish(populate_rest=False))
        preallocate.check_space(memory.regions, self.missing.sets)
        record = PostcopyRecord(
            migration=self._incoming.hello.migration,
            source=self._incoming.hello.name,
            regions=[records.record_of(region) for region in memory.regions],
            large=[messages.pack_units(units) for units in placement.large],
            userfaults={},
        )
        self.postcopy = PostcopyMemory(record, memory.regions, self._host)
        channel = self._incoming.channel
        await channel.during(self.postcopy.begin(self.missing.sets, streams, channel))
        fault_point("destination.pager-begun")

    async def prepared(self) -> None:
        """Wait until the workload is prepared for loading its state."""
        if self._preparing is not None:
            await self._preparing

    async def abandon(self) -> None:
        """Stop preparing, and fail accesses to missing pages: the workload stays at the source."""
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.gather(self._preparing, return_exceptions=True)
        if self.postcopy is not None:
            await self.postcopy.abandon()

    def close(self) -> None:
        """Stop the pager."""
        if self.postcopy is not None:
            self.postcopy.close()
