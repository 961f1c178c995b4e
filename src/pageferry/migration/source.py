"""Source of a migration: rounds of copying while the workload runs, then the switch-over (S2).

`Source.run` is the whole sequence. `messages` specifies the protocol, `ownership` which side may run the workload. In
post-copy there are no rounds, and in hybrid mode they may end early. Pages that have not been sent then remain at the
source at the switch-over, and `postcopy_source` sends them while the workload runs at the destination.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator
from hashlib import blake2b
from logging import getLogger

from pageferry._engine import BlockSender, PageSet, Trace
from pageferry.errors import (
    MigrationError,
    OutcomeUnknown,
    PageferryError,
    PeerRefused,
    ProtocolError,
    WorkloadError,
)
from pageferry.events import Listener
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder
from pageferry.host.stopwatch import Stopwatch
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory, close_to_writes
from pageferry.migration import events, ownership, postcopy_source, statistics, switchover_request
from pageferry.migration.convergence import HYBRID_BUDGET, Convergence, Decision
from pageferry.migration.deferred_pages import load_all, part_of, send_deferred
from pageferry.migration.engine_call import GRACE, Counters, off_loop, to_the_end, within_grace
from pageferry.migration.missing_pages import send_missing
from pageferry.migration.options import Options
from pageferry.migration.ownership import RECORD, Committed
from pageferry.migration.postcopy_source import PageService
from pageferry.migration.throttle import STEPS, Throttle
from pageferry.migration.transport import messages, peer_users
from pageferry.migration.transport.addresses import Address
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import PageStream, connect_control, connect_streams
from pageferry.migration.transport.tls import Trust
from pageferry.workloads.deferred_access import AcquiredPager, large_units
from pageferry.workloads.direct_io import Drains, registered_buffers
from pageferry.workloads.protocols import Migratable

log = getLogger(__name__)

REPORT_TIMEOUT = 5.0
"""Seconds to wait for the destination's report; the migration is complete without it."""
CHUNKS = 8
"""A hybrid migration sends at most this fraction of the memory, an eighth, at a time, so that it can switch to
post-copy soon after it is requested to or the rounds turn out not to converge."""
MIN_CHUNK, MAX_CHUNK = (16 << 20) // SMALL_PAGE, (256 << 20) // SMALL_PAGE
"""Bounds of such a chunk of a region, pages: 16 MiB, because each chunk costs a round trip, and 256 MiB."""


class Source:
    """One migration of one workload.

    `folder`: directory for its durable records; None for a workload without a name. `trust`: certificates that
    authenticate the destination; None without TLS. `hold`: acquired pager of a workload with deferred memory, released
    by the caller.
    """

    def __init__(
        self,
        workload: Migratable,
        options: Options,
        listener: Listener,
        folder: Folder | None = None,
        trust: Trust | None = None,
        hold: AcquiredPager | None = None,
    ) -> None:
        self.workload = workload
        self.options = options
        self.trust = trust
        self.hold = hold
        self.deferred = hold is not None
        """Whether memory is deferred at the source."""
        self.listener = listener
        self.folder = folder
        self.migration = secrets.token_hex(16)
        self.times = Stopwatch("setup")
        budget = HYBRID_BUDGET if options.mode == "hybrid" else float("inf")
        throttles = len(STEPS) if options.auto_converge else 0
        self.convergence = Convergence(options.max_downtime, options.max_rounds, budget, throttles)
        self.throttle: Throttle | None = None
        self.round = 0
        self.barriers = 0
        self.collections = 0
        self.drains = Drains(workload)
        self.pinned = 0
        """Number of pages sent during the pause because they belong to buffers that stay pinned."""
        self.touched = False
        """Whether the workload has been paused, or prepared for it."""
        self.paused = False
        self.committed = False
        self.stays_paused = False
        """Whether the workload stays paused at the destination, because its user had paused it."""
        self.postcopy = options.mode == "postcopy"
        """Whether pages that were not sent before the pause are sent after the switch-over."""
        self.postcopy_streams: list[PageStream] = []
        """Post-copy streams for these pages."""
        self.service: PageService | None = None
        self.arrived: messages.Arrived | None = None
        self.control: Channel | None = None
        self.trace: Trace | None = None
        self.install_seconds = 0.0
        self.released_units = 0
        self.report: messages.Report | None = None
        self.unreported: list[events.RoundEvent] = []
        """Rounds of the switch-over, reported after it."""

    async def run(self, address: Address) -> events.MigrationResult:
        """Migrate the workload. On any error before commit, it keeps running at the source.

        Raises MigrationError (see `errors`). OutcomeUnknown leaves the workload paused. PostcopyPaused means that it
        runs at the destination and waits for pages that are still at the source.
        """
        self.peer = str(address)
        self.hostname = self.options.tls_hostname or address.name
        try:
            return await self._run(address)
        finally:
            # Unmap and close now, not when this object is collected: an exception may keep a reference to it.
            for name in ("memory", "sender", "service", "trace", "hold"):
                self.__dict__.pop(name, None)

    async def _run(self, address: Address) -> events.MigrationResult:
        try:
            with self.times.measure("setup"):
                await self._set_up(address)
            self.times.phase("copy")
            await self._copy_rounds()
            await self._switch_over()
            running = await self._commit_to_the_end()
        except BaseException as error:
            if not await within_grace(self._fail(error), error):
                log.warning(
                    "%s: the workload does not respond, and will resume when this process exits", self.workload.name
                )
            raise
        for event in self.unreported:  # not in the pause: a listener may take its time
            self.listener(event)
        await self._send_missing_pages()
        # The workload has moved: a cancellation from here on waits until its remains are removed, and is dropped.
        await to_the_end(self._retire())
        statistics.report_destination(self)
        return statistics.result_of(self, running)

    # -- set-up

    async def _set_up(self, address: Address) -> None:
        self.memory = Memory(self.workload)
        await self.workload.check_mappers()
        owners = peer_users.owners_of(segment.pid for region in self.memory.regions for segment in region.segments)
        self.control = await connect_control(address, self.options.timeout, self.trust, owners)
        self.peer = str(self.control.address)
        fault_point("source.connected")
        await self.channel.send(self._hello())
        fault_point("source.greeted")
        welcome = await self.channel.receive(messages.Welcome)
        await self._connect_streams(address, welcome.token)
        self.hot = self.memory.page_sets()
        self.large = await off_loop(lambda: large_units(self.memory, self.hold))
        if not self.postcopy:
            await self._install_trace()
        if self.options.auto_converge:
            self.throttle = Throttle(self.workload.name, self.memory.regions)
        statistics.report_setup(self)
        for number, units in enumerate(self.large):
            await self.channel.send(messages.LargePages(region=number, units=messages.pack_units(units)))
        fault_point("source.set-up")

    async def _connect_streams(self, address: Address, token: bytes) -> None:
        count, chosen = self.options.streams, self.options
        streams = await connect_streams(self.channel, address, token, range(count))
        try:
            self.sender = BlockSender(
                [stream.handle for stream in streams],
                chosen.codec,
                timeout=chosen.timeout,
                bandwidth=chosen.bandwidth,
                adaptive=chosen.adaptive,
            )
        finally:
            for stream in streams:
                stream.close()
        if self.options.mode != "precopy":
            self.postcopy_streams = await connect_streams(self.channel, address, token, range(count, 2 * count + 1))

    def _hello(self) -> messages.Hello:
        self.identity = identity = self.workload.identity
        return messages.Hello(
            version=messages.VERSION,
            migration=self.migration,
            kind=identity.kind,
            name=identity.name,
            details=identity.details,
            regions=[
                messages.RegionInfo(name=region.name, length=region.length, page_size=region.page_size)
                for region in self.memory.regions
            ],
            streams=self.options.streams,
            codec=self.options.codec,
            populate=self.options.populate,
            keep_large=self.options.large_pages == "keep",
            mode=self.options.mode,
        )

    async def _install_trace(self) -> None:
        """Install the write traces in a helper thread. The workload is not stopped."""
        if (hold := self.hold) is None:
            large = self.memory.collapsible(self.large)
            trace = await off_loop(lambda: Trace(self.memory.segments, self.options.release_after, large))
        else:
            trace = await off_loop(lambda: Trace(self.memory.segments, userfaults=hold.userfaults))
        self.trace, self.install_seconds = trace, trace.install_seconds
        self.drains.due = True

    # -- copying while the workload runs

    async def _copy_rounds(self) -> None:
        """Run the rounds, except in post-copy. Sets `rest`, the pages whose current contents have not been sent."""
        self.rest = self.memory.page_sets(full=True)
        if self.postcopy:
            # An empty round: the workload keeps running here until the destination has allocated its huge pages.
            await self._send_unreported(self.memory.page_sets())
            return
        with self._accepting_switch_requests():
            await self._copy_until_decided()

    async def _copy_until_decided(self) -> None:
        """Send all pages in round 1, and in each further round those modified since, until the policy decides to
        stop."""
        pages = self.rest
        while True:
            started, drained = time.perf_counter(), self.drains.seconds
            before = self.sender.progress
            left = await self._send_round(pages)
            if not any(left):
                self.deferred = False  # round 1 has loaded all pages
            covered = _covered(before, self.sender.progress)
            fault_point("source.between-rounds")
            pages = await self._collect()
            modified = _count(pages)
            remaining = _count(_union(pages, left))
            # Drains are excluded: this bandwidth estimates the time for the last pages, which are sent without one.
            seconds = time.perf_counter() - started - (self.drains.seconds - drained)
            decision = self.convergence.after_round(covered, seconds, remaining * SMALL_PAGE)
            self.listener(statistics.round_event(self, before, seconds, remaining=remaining, modified=modified))
            if self._switch_requested() or (decision is Decision.STALLED and self.options.mode == "hybrid"):
                decision, self.postcopy = Decision.SWITCH_OVER, True
            if decision is Decision.THROTTLE:
                await self._tighten_throttle()
            if decision is Decision.STALLED:
                raise statistics.not_converging(self, remaining * SMALL_PAGE, seconds)
            if decision is Decision.SWITCH_OVER:
                self.rest = pages
                return

    async def _drain(self) -> None:
        """Complete I/O that had pinned pages before the last collection, so that its writes are part of the data
        sent."""
        await self.channel.during(self.drains.drain_if_due())

    async def _pinned(self) -> list[PageSet]:
        """Return the pages in buffers that stay pinned: the trace does not report writes to them."""
        pinned = await off_loop(lambda: registered_buffers(self.memory.regions))
        self.pinned = _count(pinned)
        return pinned

    async def _tighten_throttle(self) -> None:
        assert self.throttle is not None
        if not await self.throttle.tighten():
            self.convergence.throttles = 0
        fault_point("source.throttled")

    @contextlib.contextmanager
    def _accepting_switch_requests(self) -> Iterator[None]:
        """Accept `pageferry migrate --switch` in hybrid mode."""
        with contextlib.ExitStack() as stack:
            if self.options.mode == "hybrid" and self.folder is not None:
                stack.enter_context(switchover_request.listening(self.folder))
            yield

    def _switch_requested(self) -> bool:
        return self.options.mode == "hybrid" and self.folder is not None and switchover_request.requested(self.folder)

    async def _collect(self) -> list[PageSet]:
        """Return the pages modified since the last collection. They are protected again before they are read."""
        assert self.trace is not None
        dirty, trace = self.memory.page_sets(), self.trace
        await off_loop(lambda: trace.collect(dirty))
        self.collections += 1
        self.drains.due = not self.paused
        for hot, new in zip(self.hot, dirty, strict=True):
            hot.update(new)
        return dirty

    async def _send_round(self, pages: list[PageSet]) -> list[PageSet]:
        """Send these pages. Return those not sent because the migration switches over early."""
        await self._drain()
        self.round += 1
        left, started = [region.copy() for region in pages], time.perf_counter()
        progress = asyncio.create_task(statistics.report_progress(self, self.round, _count(pages)))
        try:
            for chunk in self._chunks(pages):
                await self._send_chunk(chunk)
                for region, sent in zip(left, chunk, strict=True):
                    region.subtract(sent)
                if any(left) and (self._switch_requested() or await self._will_stall(left, started)):
                    break
        finally:
            progress.cancel()
            (end,) = await asyncio.gather(progress, return_exceptions=True)
        if isinstance(end, Exception):
            raise end
        return left

    async def _will_stall(self, left: list[PageSet], started: float) -> bool:
        """Return whether a hybrid migration is certain to stall after its first round, so that it need not complete
        it."""
        if self.round > 1 or self.touched or self.trace is None:
            return False
        again, trace = self.memory.page_sets(), self.trace
        await off_loop(lambda: trace.peek(again))
        for region, unsent in zip(again, left, strict=True):
            region.subtract(unsent)
        total = self.memory.size // SMALL_PAGE
        return self.convergence.will_stall(total, total - _count(left), time.perf_counter() - started, _count(again))

    def _chunks(self, pages: list[PageSet]) -> Iterator[list[PageSet]]:
        """Yield all pages at once; in hybrid mode, chunks of them, so that switching to post-copy takes effect
        soon."""
        if self.options.mode != "hybrid" or self.touched:
            yield pages
            return
        none = self.memory.page_sets()
        size = min(max(self.memory.size // SMALL_PAGE // CHUNKS, MIN_CHUNK), MAX_CHUNK)
        for number, region in enumerate(pages):
            for start in range(0, region.pages, size):
                chunk = part_of(region, start, size)
                if chunk:
                    yield [*none[:number], chunk, *none[number + 1 :]]

    async def _send_chunk(self, pages: list[PageSet]) -> None:
        self.barriers += 1
        number, sender = self.barriers, self.sender
        await self.channel.send(messages.Round(number=number))
        fault_point("source.in-round")
        if self.deferred and self.hold is not None:
            await self.channel.during(send_deferred(self.hold, sender, self.memory.mappings, pages, number))
        else:
            await self.channel.during(
                off_loop(lambda: sender.send(self.memory.mappings, pages, number), cancel=sender.cancel)
            )
        done = await self.channel.receive(messages.RoundDone)
        if done.number != number:
            raise ProtocolError(f"the peer finished round {done.number}, expected {number}")

    # -- switch-over

    async def _switch_over(self) -> None:
        """Pause the workload, send the last pages (post-copy: their numbers) and the device state, and wait for
        Ready."""
        await self.workload.check_mappers()
        self.touched = True
        self.times.phase("prepare")
        await self._prepare_pause()
        if self.throttle is not None:
            self.throttle.lift()
        self.times.start("downtime")
        self.times.phase("stop")
        with self.times.measure("stop"):
            await self.workload.pause()
        self.times.phase("last-pages")
        self.paused, self.drains.due = True, False  # pausing has completed all I/O
        fault_point("source.paused")
        self._check_identity()
        state = await (self._name_rest() if self.postcopy else self._send_rest())
        self.memory.check_files()
        await self._send_state(state[messages.EARLY_STATE :])
        await self.channel.send(messages.StateEnd(length=len(state), digest=blake2b(state, digest_size=32).digest()))
        fault_point("source.state-sent")
        self.times.phase("load")
        self.ready = await self.channel.receive(messages.Ready, self.options.timeout)
        self.memory.check_files()
        fault_point("source.ready")

    def _check_identity(self) -> None:
        """Raise WorkloadError if the configuration of the workload has changed since Hello: the destination matches
        that."""
        told, now = self.identity.details, self.workload.identity.details
        if changed := [key for key in told if told[key] != now.get(key)]:
            raise WorkloadError(
                f"{self.workload.name} was reconfigured while it was moved: "
                + "; ".join(f"{key} was {told[key] or 'none'}, is now {now.get(key) or 'none'}" for key in changed)
                + ": try again with a destination that is configured the same way"
            )

    async def _send_rest(self) -> bytes:
        """Send the last pages while the device state is saved; return the state."""
        with self.times.measure("save"):
            saving = asyncio.create_task(self._save_state())
            try:
                with self.times.measure("last pages"):
                    await self._send_unreported(_union(await self._collect(), await self._pinned()))
            finally:
                state = await saving
        # Saving the state may itself write to memory (devices flush their queues).
        last = await self._collect()
        if any(last):
            with self.times.measure("last pages"):
                await self._send_unreported(last)
        fault_point("source.last-pages-sent")
        if self.options.populate == "hot":
            await self._send_hot()
        return state

    async def _name_rest(self) -> bytes:
        """Save the device state and send the set of missing pages (post-copy), which can be requested from then on."""
        with self.times.measure("save"):
            state = await self._save_state()
        if self.trace is not None:
            # An empty round, for pages freed since they were sent: the destination must discard them.
            with self.times.measure("last pages"):
                await self._send_unreported(self.memory.page_sets())
            self.rest = _union(_union(await self._collect(), self.rest), await self._pinned())
        missing = await off_loop(lambda: self.memory.data_of(self.rest))
        self._note_remaining(missing)
        await send_missing(self.channel, missing)
        fault_point("source.missing-sent")
        self.service = PageService(self.memory, missing, self.postcopy_streams, self.options, self.options.timeout)
        self.service.start()
        return state

    async def _prepare_pause(self) -> None:
        """Prepare the pause, and send the remaining pages once more during it; only later writes are left for the
        pause."""
        if any(self.rest) and not self.postcopy:
            await self._drain()
        preparing = asyncio.create_task(self.workload.prepare_pause())
        try:
            if self.deferred and self.hold is not None:
                await self.channel.during(load_all(self.hold, [region.pages for region in self.rest]))
                self.deferred = False
            if any(self.rest) and not self.postcopy:
                await self._send_unreported(self.rest)
        finally:
            was_prepared = preparing.done()
            await preparing
        if was_prepared:  # for some time: the workload is checked again, now and not in the pause
            await self.workload.prepare_pause()

    async def _send_unreported(self, pages: list[PageSet]) -> None:
        """Send a round of the switch-over. It is reported after the resume, so that no listener prolongs the pause."""
        self._note_remaining(pages)
        before, started = self.sender.progress, time.perf_counter()
        await self._send_round(pages)
        self.unreported.append(statistics.round_event(self, before, time.perf_counter() - started))

    def _note_remaining(self, pages: list[PageSet]) -> None:
        """Complete the event of the last unreported round, which left these pages to send."""
        if self.unreported:
            self.unreported[-1] = statistics.with_remaining(self.unreported[-1], _count(pages))

    async def _save_state(self) -> bytes:
        """Save the device state, and send its first `EARLY_STATE` bytes. Return the whole state.

        The destination queues these bytes until it has received the last pages.
        """
        state = await self.workload.save_state()
        await self._send_state(state[: messages.EARLY_STATE])
        return state

    async def _send_hot(self) -> None:
        for number, hot in enumerate(self.hot):
            units = messages.pack_units([count > 0 for count in hot.unit_counts()])
            await self.channel.send(messages.Hot(region=number, units=units))

    async def _send_state(self, part: bytes) -> None:
        for start in range(0, len(part), messages.STATE_CHUNK):
            await self.channel.send(messages.State(data=part[start : start + messages.STATE_CHUNK]))

    # -- commit

    async def _commit_to_the_end(self) -> messages.Running:
        """Commit. After a cancellation, wait for the reply for GRACE seconds only; then the outcome is unknown."""
        task = asyncio.ensure_future(self._commit())
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((task,), timeout=GRACE)
                if self.committed:
                    task.cancel()
        return task.result()

    async def _commit(self) -> messages.Running:
        """Hand over the workload. Once this is recorded, the source never runs it on its own."""
        self.times.phase("hand-over")
        self.stays_paused = self.workload.stays_paused
        self._record_commit()
        fault_point("source.recorded")
        await self.workload.commit()
        fault_point("source.committed")
        self.committed = True
        try:
            await self.channel.send(messages.Commit())
            fault_point("source.commit-sent")
            running = await self.channel.receive(messages.Running)
        except PeerRefused:
            # The destination decides before it refuses: the source owns the workload.
            self.committed = False
            raise
        except (MigrationError, asyncio.CancelledError) as error:
            ask = f"pageferry migrate {self.workload.name} --recover" if self.folder else "pageferry.recover"
            raise OutcomeUnknown(
                f"{self.workload.name}: no reply to the commit from {self.peer} ({_reason(error)}). The workload "
                f"stays paused on this host; to learn the outcome, run: {ask}",
                self.migration,
                self.peer,
                self.hostname,
            ) from error
        fault_point("source.answered")
        self.times.stop("downtime")
        self.times.phase("postcopy" if self.service is not None else "report")
        return running

    async def _send_missing_pages(self) -> None:
        """Send the missing pages (post-copy), pushed in the background and on request."""
        if self.service is not None:
            started = time.perf_counter()
            try:
                with self.times.measure("postcopy"):
                    self.arrived = await self.service.send_all(self.channel, self.listener)
            except BaseException as error:
                await to_the_end(self._keep_pages())
                if isinstance(error, PageferryError):
                    raise postcopy_source.paused(self.workload.name, self.peer, error) from error
                log.warning("%s", postcopy_source.paused(self.workload.name, self.peer, error))
                raise
            fault_point("source.arrived")
            self.round += 1
            self.listener(statistics.postcopy_round(self, self.service, time.perf_counter() - started))
        self.times.stop_all()

    async def _keep_pages(self) -> None:
        """Keep the pages after the link was lost or the command cancelled: the destination does not have all of
        them."""
        assert self.service is not None
        self.listener(self.service.event("postcopy-paused"))
        with contextlib.suppress(PageferryError):
            await self._remove_trace()
        await self._disconnect()

    # -- ends

    async def _retire(self) -> None:
        """Remove the remains of the workload after it has moved, and end the connection."""
        gone = await self._clear_away()
        with contextlib.suppress(MigrationError):
            self.report = await self.channel.receive(messages.Report, REPORT_TIMEOUT)
        if gone:
            # Otherwise the record remains and the source will send Recover, so the peer must keep its decision.
            with contextlib.suppress(MigrationError):
                await self.channel.send(messages.Done())
        await self._disconnect()

    async def _clear_away(self) -> bool:
        try:
            await self._end_throttle()
            await self._remove_trace()
            await off_loop(self._close_mappings)
            await self.workload.discard()
        except PageferryError as error:
            log.warning(
                "%s: runs at %s, but cannot be removed from this host: %s; to retry, run pageferry migrate %s "
                "--recover",
                self.workload.name,
                self.peer,
                error,
                self.workload.name,
            )
            return False
        return True

    def _close_mappings(self) -> None:
        """Make an arena read-only in the other processes that map it: their writes would be lost."""
        if self.workload.identity.kind != "arena":
            return
        owner, start, *_ = self.memory.segments[0]
        for space, address, length, *_ in self.memory.segments:
            if (space.pid, address) == (owner.pid, start):
                continue  # its own program closes this one
            with contextlib.suppress(OSError):  # the process has exited, or no longer maps it
                close_to_writes(space, address, length)

    async def _fail(self, error: BaseException) -> None:
        """Clean up after an error: before commit, resume the workload at the source and send Abort."""
        try:
            if not self.committed:
                if self.service is not None:
                    self.service.close()
                await self._restore_state()
            else:
                await self._untrace()  # `take_back` may resume it
        finally:
            await self._end_throttle()
            if self.control is not None and not self.committed:
                await self.control.abort(_reason(error))
            await self._disconnect()

    async def _restore_state(self) -> None:
        """Restore the previous state: the workload runs, without write traces, on PMD mappings."""
        try:
            if self.touched:
                await self.workload.resume()
            self._forget_commit()
        finally:
            await self._untrace()

    async def _untrace(self) -> None:
        if self.trace is not None:
            await self._remove_trace()
            if self.hold is None:  # else the pager does so when nothing is deferred
                await off_loop(lambda: self.memory.restore_large_mappings(self.large))

    async def _end_throttle(self) -> None:
        if self.throttle is not None:
            await self.throttle.close()

    async def _remove_trace(self) -> None:
        if self.trace is not None:
            trace, self.trace = self.trace, None
            self.released_units = trace.released_units
            await off_loop(trace.remove)

    async def _disconnect(self) -> None:
        if self.service is not None:
            self.service.close()
        for connection in self.postcopy_streams:
            connection.close()
        if self.control is not None:
            await self.control.close()

    @property
    def channel(self) -> Channel:
        """Control connection; requires `_set_up`."""
        assert self.control is not None
        return self.control

    def _record_commit(self) -> None:
        if self.folder is not None:
            record = Committed(
                version=ownership.VERSION,
                changes=self.workload.changes,
                migration=self.migration,
                peer=self.peer,
                hostname=self.hostname,
                owes=self.service is not None,
                streams=self.options.streams,
                codec=self.options.codec,
                bandwidth=self.options.bandwidth,
                adaptive=self.options.adaptive,
            )
            self.folder.store(RECORD, record)

    def _forget_commit(self) -> None:
        if self.folder is not None:
            self.folder.forget(RECORD)


def _count(sets: list[PageSet]) -> int:
    return sum(len(pages) for pages in sets)


def _union(sets: list[PageSet], others: list[PageSet]) -> list[PageSet]:
    """Add the other sets to the first ones, which are returned."""
    for pages, more in zip(sets, others, strict=True):
        pages.update(more)
    return sets


def _covered(before: Counters, after: Counters) -> int:
    """Return the bytes of memory covered between two readings, without holes, which take no time."""
    return (after[2] + after[3] - before[2] - before[3]) * SMALL_PAGE


def _reason(error: BaseException) -> str:
    """Return the reason for Abort."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled at the source"
    return str(error) or type(error).__name__
