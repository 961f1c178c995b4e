"""Source of a migration: the sequence of its phases, and the clean-up at its end.

`Source.run` sets up the session, copies (`precopy`), switches over (`switchover`), commits (`commit`), and in post-copy
sends the pages that are missing at the destination (`postcopy_source`). `messages` specifies the protocol, and
`ownership` determines which side may run the workload. A post-copy migration copies no pages in rounds; in hybrid mode,
the rounds may end early.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from logging import getLogger
from typing import Literal

from pageferry.errors import MigrationError, PageferryError, ProtocolError, WorkloadError
from pageferry.host.blocking import ignoring_cancellation
from pageferry.host.fault_points import fault_point
from pageferry.memory.view import Extent, Memory
from pageferry.migration import events
from pageferry.migration.commit import Commit, reason_of
from pageferry.migration.disk_source import DiskSource, buffer_of, numbers_of
from pageferry.migration.engine_call import off_loop, within_grace
from pageferry.migration.ownership import RECORD
from pageferry.migration.postcopy_source import Postcopy
from pageferry.migration.precopy import Precopy, Rest
from pageferry.migration.rounds import Rounds
from pageferry.migration.session import Job, Session, open_link
from pageferry.migration.source_memory import SourceMemory, open_memory
from pageferry.migration.source_state import SourceState, source_states
from pageferry.migration.statistics import MigrationStatistics, milliseconds
from pageferry.migration.switchover import PostcopySwitchOver, PrecopySwitchOver, SwitchOver
from pageferry.migration.throttle import Throttle
from pageferry.migration.transport import messages, peer_users
from pageferry.migration.transport.addresses import Address
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import connect_control, connect_streams
from pageferry.migration.write_trace import WriteTrace
from pageferry.workloads.deferred_access import large_units
from pageferry.workloads.direct_io import Drains
from pageferry.workloads.disk_copies import CopiesDisks
from pageferry.workloads.protocols import COPIED, DISKS, SHARED, announce, update_details

log = getLogger(__name__)

REPORT_TIMEOUT = 5.0
"""Seconds to wait for the destination's report; the migration is complete without it."""


class Source:
    """One migration of one workload. Its phases are entered in the order of `SourceState`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = source_states(job.workload.name)
        self.statistics = MigrationStatistics(job.workload.name, job.options, Drains(job.workload))
        self._control: Channel | None = None
        """Connection to the destination; None until it is established."""
        self._session: Session | None = None
        """Session with the destination; None until the destination has accepted the migration."""

    async def run(self, address: Address) -> events.MigrationResult:
        """Migrate the workload. After any error before the commit, the workload keeps running at the source.

        Raises MigrationError (see `errors`). After OutcomeUnknown, the workload is paused. After PostcopyPaused, it
        runs at the destination and waits for pages that are still at the source.
        """
        self.state.enter(SourceState.SETUP)
        with contextlib.closing(open_memory(self.job.workload)) as memory:
            try:
                return await self._run(address, memory)
            finally:
                if self._session is not None:
                    self._session.close()

    async def _run(self, address: Address, memory: SourceMemory) -> events.MigrationResult:
        try:
            session = await self._set_up(address, memory)
            rounds = Rounds(session)
            switch_over = await session.beside_disks(self._copy(session, rounds))
            await self._switch_over(switch_over)
            self.statistics.disks_sent = session.disks.sent if session.disks is not None else 0
            self.statistics.running = await Commit(session, self.state).run()
        except BaseException as error:
            if not await within_grace(self._fail(error), error):
                log.warning(
                    "%s: the workload does not respond, and will resume when this process exits", self.job.workload.name
                )
            raise
        for sent in switch_over.sent:
            rounds.report(sent)
        await self._send_missing_pages(session, rounds)
        # The workload has moved, and its remains must be removed: from here on, cancellations are ignored.
        await ignoring_cancellation(self._retire(session))
        self.state.enter(SourceState.COMPLETED)
        self._report_destination(memory)
        return self.statistics.result()

    # -- set-up

    async def _set_up(self, address: Address, memory: SourceMemory) -> Session:
        """Connect to the destination, and install the write traces."""
        with self.statistics.times.measure("setup"):
            self.statistics.memory = memory.size
            reading = asyncio.ensure_future(off_loop(lambda: large_units(memory, self.job.hold)))
            try:
                session = await self._connect(address, memory)
            finally:
                self.statistics.large = await reading
            await self._observe(session)
            self._report_setup(memory)
            for number, units in enumerate(self.statistics.large):
                await session.channel.send(messages.LargePages(region=number, units=messages.pack_units(units)))
            fault_point("source.set-up")
        return session

    async def _connect(self, address: Address, memory: SourceMemory) -> Session:
        job = self.job
        self.statistics.peer = str(address)
        await job.workload.check_mappers()
        owners = peer_users.owners_of(segment.pid for region in memory.regions for segment in region.segments)
        control = await connect_control(address, job.options.timeout, job.trust, owners)
        self._control, self.statistics.peer = control, str(control.address)
        fault_point("source.connected")
        await update_details(job.workload)
        hello = hello_of(job, memory)
        await control.send(hello)
        fault_point("source.greeted")
        welcome = await control.receive(messages.Welcome)
        if DISKS in hello.details and not welcome.disks and job.options.disks != "shared":
            raise ProtocolError(
                "cannot compare the disks of the guest: the release of the receiver is older and does not support "
                'this; use the same release of pageferry on both hosts, or --disks shared (in Python disks="shared")'
            )
        link = await open_link(job.options, control, address, welcome.token)
        self._session = session = Session(job, memory, link, hello, self.statistics)
        if not isinstance(memory, Memory):
            agreement = await control.during(memory.agree(welcome, hello, job.options))
            self.statistics.clone, session.deferred = agreement.move, agreement.loader
        if numbers := numbers_of(welcome, hello, job.options):
            await self._copy_disks(session, address, welcome.token, numbers)
        return session

    async def _copy_disks(self, session: Session, address: Address, token: bytes, numbers: Sequence[int]) -> None:
        """Connect a stream for each of these disks, and start to copy them."""
        options, workload = self.job.options, self.job.workload
        assert isinstance(workload, CopiesDisks), "only guests describe disks"
        mirrors = workload.disk_mirrors(numbers, buffer_of(options, len(numbers)))
        first = options.streams + len(session.link.postcopy)
        streams = await connect_streams(session.channel, address, token, range(first, first + len(numbers)))
        session.disks = DiskSource(mirrors, streams, session.link.sender, options, self.job.listener)
        self.statistics.disks = mirrors.disks
        await session.channel.during(session.disks.start())

    async def _observe(self, session: Session) -> None:
        """Install the write traces, except in post-copy mode. Start to measure the CPU time of a workload that may be
        throttled."""
        if self.job.options.mode != "postcopy":
            session.trace = await WriteTrace.install(session.memory, self.statistics, self.job.hold)
            session.drains.due = True
        if self.job.options.auto_converge:
            session.throttle = Throttle(self.job.workload.name, session.memory.regions)

    # -- phases

    async def _copy(self, session: Session, rounds: Rounds) -> SwitchOver:
        """Send pages while the workload runs. Return the switch-over for the pages that are left."""
        self.state.enter(SourceState.COPYING)
        self.statistics.times.phase("copy")
        if session.trace is None:
            await session.disks_copied()
            switch_over = PostcopySwitchOver(session, rounds, Rest(session.memory.page_sets(full=True), postcopy=True))
            await switch_over.announce()
            return switch_over
        rest = await Precopy(session, session.trace, rounds).run()
        if rest.postcopy:
            await session.disks_copied()
            return PostcopySwitchOver(session, rounds, rest)
        return PrecopySwitchOver(session, rounds, rest, session.trace)

    async def _switch_over(self, switch_over: SwitchOver) -> None:
        self.state.enter(SourceState.SWITCHING_OVER)
        self.statistics.ready = await switch_over.run()
        self.state.enter(SourceState.READY)

    async def _send_missing_pages(self, session: Session, rounds: Rounds) -> None:
        if session.service is not None:
            await Postcopy(session, session.service, rounds).run()
        self.statistics.times.stop_all()

    # -- completion and failure

    async def _retire(self, session: Session) -> None:
        """Remove the remains of the workload after it has moved, and close the connection."""
        gone = await self._clear_away(session)
        with contextlib.suppress(MigrationError):
            self.statistics.report = await session.channel.receive(messages.Report, REPORT_TIMEOUT)
        if gone:
            # Otherwise the record remains and the source will send Recover, so the peer must keep its decision.
            with contextlib.suppress(MigrationError):
                await session.channel.send(messages.Done())
        session.stop_service()
        await session.channel.close()

    async def _clear_away(self, session: Session) -> bool:
        name = self.job.workload.name
        try:
            await session.end_throttle()
            await session.remove_trace()
            if self.job.workload.identity.kind == "arena":
                await off_loop(lambda: close_mappings(session.memory))
            await self.job.workload.discard()
        except PageferryError as error:
            log.warning(
                "%s: runs at %s, but cannot be removed from this host: %s; to retry, run pageferry migrate %s "
                "--recover",
                name,
                self.statistics.peer,
                error,
                name,
            )
            return False
        return True

    async def _fail(self, error: BaseException) -> None:
        """Clean up after an error: unless the outcome is unknown, resume the workload at the source and send Abort."""
        undecided = self.state.is_in(SourceState.COMMITTED)
        pauses = not self.state.is_in(SourceState.SETUP, SourceState.COPYING)
        try:
            if undecided:
                await self._untrace()  # `take_back` may resume the workload later
            else:
                await self._restore()
        finally:
            await self._disconnect(None if undecided else error)
        if pauses and not undecided:
            # The destination may have announced the workload as well.
            await announce(self.job.workload)

    async def _restore(self) -> None:
        """Restore the state before the migration: resume the workload if it was paused, delete the record of the
        commit, remove the write traces, and restore PMD mappings."""
        disks = None
        if self._session is not None:
            self._session.stop_service()
            disks = self._session.disks
        if disks is not None:  # before the workload resumes, so that no request to its disks waits for the link
            await disks.abandon()
        touched = not self.state.is_in(SourceState.SETUP, SourceState.COPYING)
        self.state.enter(SourceState.FAILED)
        try:
            if touched:
                await self.job.workload.resume()
            if self.job.folder is not None:
                self.job.folder.forget(RECORD)
            if disks is not None:
                await disks.mirrors.cancel()
        finally:
            await self._untrace()

    async def _untrace(self) -> None:
        if (session := self._session) is not None and session.trace is not None:
            await session.remove_trace()
            if self.job.hold is None:  # otherwise the pager restores them once no page is deferred
                await off_loop(lambda: session.memory.restore_large_mappings(list(self.statistics.large)))

    async def _disconnect(self, error: BaseException | None) -> None:
        """Remove the CPU limit, stop the page service, and close the connection. If `error` is given, send Abort
        first."""
        if self._session is not None:
            await self._session.end_throttle()
            self._session.stop_service()
        if self._control is not None:
            if error is not None:
                await self._control.abort(reason_of(error))
            await self._control.close()

    # -- events

    def _report_setup(self, memory: SourceMemory) -> None:
        """Report the peer, the size of the memory and its huge pages."""
        statistics = self.statistics
        self.job.listener(
            events.SetupEvent(
                peer=statistics.peer,
                memory=statistics.memory,
                present=memory.present(),
                large_pages=sum(map(sum, statistics.large)),
                install_ms=milliseconds(statistics.install_seconds),
            )
        )
        self._report_large_pages("source", memory, list(statistics.large))

    def _report_destination(self, memory: SourceMemory) -> None:
        """Report the huge pages at the destination. Maps that do not match our regions are ignored."""
        report, large = self.statistics.report, self.statistics.large
        if report is None or len(report.units) != len(large):
            return
        with contextlib.suppress(ValueError):
            units = [messages.unpack_units(packed, len(ours)) for packed, ours in zip(report.units, large, strict=True)]
            self._report_large_pages("destination", memory, units)

    def _report_large_pages(
        self, side: Literal["source", "destination"], memory: SourceMemory, units: list[list[bool]]
    ) -> None:
        regions: Sequence[Extent] = memory.regions
        maps = [
            events.LargeMap.of(region.name, region.length, large) for region, large in zip(regions, units, strict=True)
        ]
        self.job.listener(events.LargePagesEvent(side=side, regions=maps))


def hello_of(job: Job, memory: SourceMemory) -> messages.Hello:
    """Return the first message of a migration, with the options of `job`. Raises WorkloadError if a detail is too
    long."""
    identity, options = job.workload.identity, job.options
    for key, value in identity.details.items():
        if isinstance(value, str) and len(value) > messages.MAX_DETAIL:
            raise WorkloadError(
                f"cannot migrate {identity.name}: the description of its {key} is longer than "
                f"{messages.MAX_DETAIL >> 10} KiB"
            )
    return messages.Hello(
        version=messages.VERSION,
        migration=job.migration,
        kind=identity.kind,
        name=identity.name,
        details=identity.details
        | ({SHARED: True} if options.disks == "shared" else {})
        | ({COPIED: True} if options.copy_disks else {})
        | ({} if isinstance(memory, Memory) else memory.details(options.memory)),
        regions=[
            messages.RegionInfo(name=region.name, length=region.length, page_size=region.page_size)
            for region in memory.regions
        ],
        streams=options.streams,
        codec=options.codec,
        populate=options.populate,
        keep_large=options.large_pages == "keep",
        mode=options.mode,
    )


def close_mappings(memory: SourceMemory) -> None:
    """Make an arena read-only in the other processes that map it, because their writes would be lost."""
    # The first segment belongs to the program of the arena, which write-protects its own mapping.
    for segment in memory.segments[1:]:
        with contextlib.suppress(OSError):  # the process has exited, or no longer maps it
            segment.space.make_read_only(segment.address, segment.length)
