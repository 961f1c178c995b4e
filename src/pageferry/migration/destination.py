"""Destination of a migration: places pages while the workload runs at the source, then takes it over.

Start reading at `Destination.run`. No process at the destination uses the memory before the source commits, so pages
are received directly into it, and verified there (`transfer`). An invalid page ends the migration, and the workload
keeps running at the source. `message_order` gives the order of the messages. In post-copy, the workload is taken over
before all pages are received, and `postcopy_destination` fetches the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from logging import getLogger
from typing import NoReturn

from pageferry.errors import ConnectionLost, PageferryError, PeerRefused, UnsupportedError
from pageferry.host.blocking import ignoring_cancellation, in_thread
from pageferry.host.fault_points import fault_point
from pageferry.host.stopwatch import Stopwatch
from pageferry.memory.view import Memory
from pageferry.migration.disk_destination import ReceivedDisks
from pageferry.migration.engine_call import within_grace
from pageferry.migration.incoming import BaseChoice, Incoming, ReceivingHost, compare_regions
from pageferry.migration.loading import Loading
from pageferry.migration.message_order import MessageOrder
from pageferry.migration.ownership import CommitDecision
from pageferry.migration.placement import Placement, TargetMemory
from pageferry.migration.recovery_server import RecoveryServer
from pageferry.migration.takeover import DestinationState, TakeOver, destination_states
from pageferry.migration.transfer import Transfer
from pageferry.migration.transport import messages
from pageferry.migration.transport.connection import ConnectionListener, PageStream
from pageferry.pager import page_faults
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.workloads.protocols import BASE, DISKS, Migratable

log = getLogger(__name__)

Prepare = Callable[[messages.Hello], Awaitable[Migratable]]
"""Function that creates or looks up the workload to receive. It raises UsageError or WorkloadError to refuse the
source."""


class Destination:
    """Receiver of one workload. `prepare` is called for every source that connects, until one is accepted.

    The receiver keeps listening after it has refused a source. It accepts only one source, even if that migration
    fails. `ended`: function that raises WorkloadDied when the process that waits for the device state exits; None if
    there is no such process.
    """

    def __init__(
        self,
        connections: ConnectionListener,
        prepare: Prepare,
        host: ReceivingHost,
        ended: Callable[[], Awaitable[NoReturn]] | None = None,
    ) -> None:
        self.connections = connections
        self.host = host
        self.state = destination_states()
        self.recovery = RecoveryServer(connections, host.decisions)
        self._prepare = prepare
        self._ended = ended
        self._opened = contextlib.ExitStack()
        """Memory and engine objects. They are closed explicitly, because an exception may keep a reference to this
        object."""
        self._incoming: Incoming | None = None
        """Accepted migration; None until a source has been accepted."""
        self._transfer: Transfer | None = None
        """Transfer of the pages; None until the page streams are connected."""
        self._disks: ReceivedDisks | None = None
        """Disks that the source copies; None if it copies none."""
        self._take_over: TakeOver | None = None
        """Take-over of the workload; None until the source has committed."""

    async def run(self) -> Migratable:
        """Receive a workload, and return it once this host owns it. Raises MigrationError if it stays at the source.

        Other connections are served until `close`.
        """
        async with self._while_it_lives():
            incoming = await self._accept()
        self.state.enter(DestinationState.RECEIVING)
        self._incoming = incoming
        self.recovery.begin(incoming.hello.migration)
        try:
            async with self._while_it_lives():
                transfer = await self._receive(incoming)
                incoming.times.phase("commit")
                await incoming.receive_one(messages.Commit)
            incoming.times.phase("resume")
            self._take_over = TakeOver(incoming, transfer, self.host.decisions, self.recovery)
            await ignoring_cancellation(self._take_over.run())
        except BaseException as error:
            if not await within_grace(self._give_up(incoming, error), error):
                log.warning("the received workload does not respond: it may not have been discarded")
            self._opened.close()
            raise
        self.state.enter(DestinationState.RUNNING)
        return incoming.workload

    async def report(self) -> None:
        """Send the report after `run`. In post-copy, fetch the missing pages first. Raises WorkloadDied."""
        if self._incoming is None or self._take_over is None:
            raise RuntimeError("cannot send the report: no workload has been received")
        try:
            if await self._take_over.report():
                self._acknowledge(self._incoming)
        finally:
            self._opened.close()

    async def finish(self) -> None:
        """Send the report, then wait until the source knows that this host owns the workload (see
        `RecoveryServer.wait_acknowledged`)."""
        await self.report()
        await self.recovery.wait_acknowledged(self.host.timeout)

    def close(self) -> None:
        """Stop serving connections, and stop the pager."""
        self.recovery.close()
        if self._transfer is not None:
            self._transfer.close()

    # -- status for the caller of `run`

    @property
    def accepted(self) -> bool:
        """Whether a source was accepted. From then on, the workload that `prepare` has returned is discarded on
        failure."""
        return not self.state.is_in(DestinationState.LISTENING)

    @property
    def prepared(self) -> bool:
        """Whether Ready was sent, so that the source may send Recover."""
        return not self.state.is_in(DestinationState.LISTENING, DestinationState.RECEIVING, DestinationState.GIVEN_UP)

    @property
    def acknowledged(self) -> asyncio.Event:
        """Event that is set once the source knows the outcome of the migration."""
        return self.recovery.acknowledged

    @property
    def times(self) -> Stopwatch:
        """Times since a source was accepted."""
        return self._incoming.times if self._incoming is not None else Stopwatch()

    @property
    def stays_paused(self) -> bool:
        """Whether the workload is left paused, because its user had paused it."""
        return self._take_over is not None and self._take_over.stays_paused

    @contextlib.asynccontextmanager
    async def _while_it_lives(self) -> AsyncIterator[None]:
        """Raise WorkloadDied, by cancelling the block, if the process that waits for the device state exits."""
        task = asyncio.current_task()
        if self._ended is None or task is None:
            yield
            return
        end = asyncio.ensure_future(self._ended())
        end.add_done_callback(lambda ended: ended.cancelled() or task.cancel())
        try:
            yield
            if end.done():
                await asyncio.sleep(0)  # raises the cancellation that the callback has requested
        except asyncio.CancelledError:
            if not end.done() or task.uncancel() > 0:  # cancelled by another task
                raise
            await end
        finally:
            end.cancel()

    # -- accepting a source

    async def _accept(self) -> Incoming:
        while True:
            channel, first = await self.connections.control()
            try:
                match first:
                    case messages.Hello() as hello:
                        messages.check_version(hello.version)
                        workload, base = await self._prepared(hello)
                        channel.limit = messages.MAX_MESSAGE
                        return Incoming(channel, hello, workload, MessageOrder(len(hello.regions), hello.mode), base)
                    case _:
                        self.recovery.attend_aside(channel, first)
                        continue
            except (PageferryError, OSError) as error:
                log.warning("a source was refused: %s", error)
                await channel.abort(str(error))
            await channel.close()

    async def _prepared(self, hello: messages.Hello) -> tuple[Migratable, BaseChoice | None]:
        """Prepare the workload for a migration, and choose the memory of a clone. If this fails, delete the records of
        the migration."""
        decisions = self.host.decisions
        decisions.begin(hello.migration)
        try:
            workload = await self._prepare(hello)
            compare_regions(workload, hello.regions)
            if hello.mode != "precopy":
                await check_page_faults(workload)
            base = await self._choose_base(hello, workload)
        except BaseException:
            decisions.forget(hello.migration)
            raise
        return workload, base

    async def _choose_base(self, hello: messages.Hello, workload: Migratable) -> BaseChoice | None:
        """Choose the memory of a clone; return None for any other workload."""
        if BASE not in hello.details and self.host.memory != "shared":
            return None
        from pageferry.migration.clone_destination import choose_base

        return await choose_base(hello, workload, self.host)

    # -- receiving

    async def _receive(self, incoming: Incoming) -> Transfer:
        """Receive the pages and the state, load them, and send Ready."""
        fault_point("destination.accepted")
        hello, count = incoming.hello, incoming.hello.streams
        pages = count if hello.mode == "precopy" else 2 * count + 1
        self._disks = disks = await ReceivedDisks.open(incoming)
        memory = self._opened.enter_context(contextlib.closing(await self._open_memory(incoming)))
        with contextlib.ExitStack() as opened:  # the engine has duplicated the descriptors
            streams = await self._streams(incoming, pages)
            for stream in streams:
                opened.enter_context(stream)
            if disks is not None:
                await disks.receive(streams[pages:])
                incoming.progress = disks.transferred
            placement = await Placement.open(incoming, memory, streams[:count], self.host.timeout)
            self._opened.callback(placement.close)
            self._transfer = transfer = Transfer(incoming, placement, self.host)
            incoming.times.phase("copy")
            state = await transfer.run(streams[count:pages])
        if disks is not None:
            await incoming.channel.during(disks.complete(self.host.timeout))
        ready = await Loading(incoming, transfer).run(state)
        fault_point("destination.loaded")
        self.state.enter(DestinationState.PREPARED)
        await incoming.send(ready)
        fault_point("destination.promised")
        return transfer

    async def _open_memory(self, incoming: Incoming) -> TargetMemory:
        """Open the memory of the workload. A clone that shares the memory of an image on this host gets a private
        mapping of its base first."""
        if (choice := incoming.base) is None or choice.image is None:
            return Memory(incoming.workload)
        from pageferry.migration.clone_destination import share_base

        return await incoming.channel.during(share_base(choice, incoming.workload, self.host))

    async def _streams(self, incoming: Incoming, pages: int) -> list[PageStream]:
        """Accept the source, and return its connections: `pages` for pages, then one for each disk."""
        channel, details = incoming.channel, incoming.hello.details
        token = os.urandom(messages.TOKEN_BYTES)
        self.connections.expect(token, channel)
        copied = self._disks.numbers if self._disks is not None else None
        base = incoming.base
        await channel.send(
            messages.Welcome(
                token=token,
                disks=DISKS in details,
                copied=copied,
                shares_base=base is not None and base.image is not None,
                base_note=base.note if base is not None else "",
            )
        )
        return await channel.during(self.connections.streams(token, pages + len(copied or ()), self.host.timeout))

    # -- failure and acknowledgement

    async def _give_up(self, incoming: Incoming, error: BaseException) -> None:
        """Give up the workload: record the decision ABORTED before reporting it, then discard the received memory and
        state. If COMMITTED was decided, only close the connection."""
        try:
            if self.host.decisions.decide(incoming.hello.migration, CommitDecision.ABORTED) is CommitDecision.COMMITTED:
                return  # this host owns the workload in spite of the failure
            await incoming.channel.abort(_reason(error))
            self._note_decision(incoming, error)
            if self._transfer is not None:
                await self._transfer.abandon()
            if self._disks is not None:
                await self._disks.abandon()
            with contextlib.suppress(PageferryError):
                await incoming.workload.discard()
        finally:
            try:
                await incoming.channel.close()
            finally:
                if self._disks is not None:
                    await self._disks.end_flush()

    def _note_decision(self, incoming: Incoming, error: BaseException) -> None:
        """Enter the final state. Delete the records if the source knows the decision or does not need it; otherwise
        keep them, because the source may send Recover."""
        prepared = self.state.is_in(DestinationState.PREPARED)
        self.state.enter(DestinationState.RENOUNCED if prepared else DestinationState.GIVEN_UP)
        if isinstance(error, PeerRefused) or not prepared:
            self._acknowledge(incoming)
        elif not isinstance(error, ConnectionLost):
            # The source may not have received the decision: the records stay, so that a later receiver can report it.
            self.acknowledged.set()

    def _acknowledge(self, incoming: Incoming) -> None:
        """Delete the records: the source knows the outcome and will not send Recover."""
        self.host.decisions.forget(incoming.hello.migration)
        self.acknowledged.set()


async def check_page_faults(workload: Migratable) -> None:
    """Check, before the source pauses the workload, that the page faults of the receiving processes can be handled.
    Raises UnsupportedError."""
    pids = {segment.pid for region in workload.regions for segment in region.segments}
    try:
        await in_thread(page_faults.check, pids)
    except CannotHandleFaults as refused:
        raise UnsupportedError(f"cannot use post-copy to this destination: {refused}; use --mode precopy") from refused


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled at the destination"
    return str(error) or type(error).__name__
