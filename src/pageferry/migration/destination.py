"""Destination of a migration: places pages while the workload runs at the source, then takes it over.

Start reading at `Destination.run`. No process uses the memory here before the source commits, so pages are received in
place and verified there. An invalid page ends the migration, and the workload keeps running at the source. In
post-copy, the workload is taken over before all pages are received, and `postcopy_destination` fetches the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import blake2b
from logging import getLogger
from typing import NoReturn

from pageferry._engine import BlockReceiver, Placer
from pageferry.errors import (
    Cancelled,
    ConnectionLost,
    MigrationError,
    PageferryError,
    PeerRefused,
    ProtocolError,
    UnsupportedError,
    WorkloadDied,
    WorkloadError,
)
from pageferry.events import Listener, ignore
from pageferry.host.blocking import in_thread
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder
from pageferry.host.stopwatch import Stopwatch
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.migration import preallocate
from pageferry.migration.engine_call import off_loop, to_the_end, within_grace
from pageferry.migration.missing_pages import MissingPages
from pageferry.migration.ownership import Verdict, Verdicts
from pageferry.migration.postcopy_destination import PostcopyMemory
from pageferry.migration.recovery_server import RecoveryServer
from pageferry.migration.transport import messages
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import PageStream, Reception
from pageferry.pager import page_faults, records
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.records import PostcopyRecord
from pageferry.workloads.protocols import Faults, Migratable

log = getLogger(__name__)

POPULATE_WORKERS = 1
"""Threads that map complete units during the transfer. One suffices: mapping is much faster than receiving."""
WATCH_FAULTS = 1.0
"""Seconds after the resume during which page faults of the workload are counted."""

Prepare = Callable[[messages.Hello], Awaitable[Migratable]]
"""Creates or looks up the workload to receive; raises UsageError or WorkloadError to refuse the source."""


class Destination:
    """Receives one workload. `prepare` is called for every source that connects, until one is accepted.

    The receiver keeps listening after it has refused a source. It accepts one source only, even if that migration
    fails. `folder`: returns the directory for records of post-copy; None for a workload without a name. `ended`: raises
    WorkloadDied if the process that waits for the device state exits.
    """

    def __init__(
        self,
        reception: Reception,
        prepare: Prepare,
        verdicts: Verdicts,
        timeout: float = 30.0,
        *,
        folder: Callable[[], Folder | None] = lambda: None,
        listener: Listener = ignore,
        ended: Callable[[], Awaitable[NoReturn]] | None = None,
    ) -> None:
        self.reception = reception
        self.prepare = prepare
        self.verdicts = verdicts
        self.timeout = timeout
        self.folder = folder
        self.listener = listener
        self.ended = ended
        self.accepted = False
        """Whether a source was accepted. From then on, the workload that `prepare` has made is discarded on failure."""
        self.recovery = RecoveryServer(reception, verdicts)
        self.times = Stopwatch()
        self.state = bytearray()
        self.digest = blake2b(digest_size=32)
        self.prepared = False
        """Whether Ready was sent: the source may commit at any time, and may send Recover later."""
        self.stays_paused = False
        """Whether the workload is left paused, because its user had paused it."""
        self.postcopy: PostcopyMemory | None = None
        """Pager of the missing pages, in post-copy."""
        self._preparing: asyncio.Task[None] | None = None

    async def run(self) -> Migratable:
        """Receive a workload; on return it runs here. Raises MigrationError if it stays at the source.

        Other connections are served until `close`.
        """
        async with self._while_it_lives():
            self.channel, hello = await self._accept()
        self.times = Stopwatch("setup")
        self.accepted = True
        self.migration = hello.migration
        self.recovery.begin(hello.migration)
        try:
            async with self._while_it_lives():
                await self._receive(hello)
                self.times.phase("commit")
                await self.channel.receive(messages.Commit)
            self.times.phase("resume")
            await to_the_end(self._take_over())
        except BaseException as error:
            if not await within_grace(self._give_up(error), error):
                log.warning("the received workload does not respond, and is left as it is")
            self._release()
            raise
        return self.workload

    def _release(self) -> None:
        """Unmap memory and close page streams now, not when this object is collected: an exception may keep a
        reference."""
        for name in ("memory", "receiver", "placer"):
            self.__dict__.pop(name, None)

    async def finish(self) -> None:
        """Send the report, then wait until the source knows that the workload runs here, or will not ask for it."""
        await self.report()
        await self.recovery.wait_acknowledged(self.timeout)

    def close(self) -> None:
        """Stop serving connections, and stop the pager."""
        self.recovery.close()
        if self.postcopy is not None:
            self.postcopy.close()

    @property
    def acknowledged(self) -> asyncio.Event:
        """Set once the source knows what became of the migration."""
        return self.recovery.acknowledged

    @contextlib.asynccontextmanager
    async def _while_it_lives(self) -> AsyncIterator[None]:
        """Raise WorkloadDied, by cancelling the block, if the process that waits for the device state exits."""
        task = asyncio.current_task()
        if self.ended is None or task is None:
            yield
            return
        end = asyncio.ensure_future(self.ended())
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

    async def _accept(self) -> tuple[Channel, messages.Hello]:
        while True:
            channel, first = await self.reception.control()
            try:
                match first:
                    case messages.Hello() as hello:
                        messages.check_version(hello.version)
                        await self._prepare(hello)
                        channel.limit = messages.MAX_MESSAGE
                        return channel, hello
                    case _:
                        self.recovery.attend_aside(channel, first)
                        continue
            except (PageferryError, OSError) as error:
                log.warning("a source was refused: %s", error)
                await channel.abort(str(error))
            await channel.close()

    async def _prepare(self, hello: messages.Hello) -> None:
        """Prepare the workload for a migration, or refuse it and delete its record."""
        self.verdicts.begin(hello.migration)
        try:
            self.workload = await self.prepare(hello)
            self._compare(hello.regions)
            if hello.mode != "precopy":
                await self._check_page_faults()
        except BaseException:
            self.verdicts.forget(hello.migration)
            raise

    # -- receiving

    async def _receive(self, hello: messages.Hello) -> None:
        fault_point("destination.accepted")
        self.memory = Memory(self.workload)
        count = hello.streams
        with contextlib.ExitStack() as opened:  # the engine has duplicates
            streams = await self._streams(count if hello.mode == "precopy" else 2 * count + 1)
            for stream in streams:
                opened.enter_context(stream)
            await self._open_placer(hello)
            handles = [stream.handle for stream in streams[:count]]
            self.receiver = BlockReceiver(handles, self.placer, self.timeout)
            self.hot: dict[int, list[int]] = {}
            self.missing = MissingPages([region.length // SMALL_PAGE for region in hello.regions])
            self.times.phase("copy")
            while await self._step():
                if self.missing.complete and self.postcopy is None:
                    await self._start_postcopy(hello, streams[count:])
        await self._make_ready(hello)

    async def _start_postcopy(self, hello: messages.Hello, late: list[PageStream]) -> None:
        """Start the pager (post-copy): from here on, accesses to missing pages wait until these are received."""
        if not late:
            raise ProtocolError("the source announced pre-copy but withholds pages")
        await off_loop(lambda: self.placer.finish(False))
        preallocate.check_space(self.memory.regions, self.missing.sets)
        record = PostcopyRecord(
            migration=hello.migration,
            source=hello.name,
            regions=[records.record_of(region) for region in self.memory.regions],
            large=[messages.pack_units(units) for units in self.large],
            userfaults={},
        )
        self.postcopy = PostcopyMemory(
            record, self.memory.regions, self.folder(), self.verdicts, self.timeout, self.listener
        )
        await self.channel.during(self.postcopy.begin(self.missing.sets, late, self.channel))
        fault_point("destination.pager-begun")

    async def _streams(self, count: int) -> list[PageStream]:
        token = secrets.token_bytes(messages.TOKEN_BYTES)
        self.reception.expect(token, self.channel)
        await self.channel.send(messages.Welcome(token=token))
        return await self.channel.during(self.reception.streams(token, count, self.timeout))

    async def _open_placer(self, hello: messages.Hello) -> None:
        self.large = [await self._large_pages(number) for number in range(len(hello.regions))]
        if hello.keep_large:
            await self.channel.during(preallocate.compact(self.memory.regions, self.large))
        self.placer = Placer(
            [
                (mapping, region.page_size, units)
                for mapping, region, units in zip(self.memory.mappings, self.memory.regions, self.large, strict=True)
            ],
            self.memory.segments,
            hello.keep_large,
            POPULATE_WORKERS if hello.populate == "all" else 0,
        )
        if hello.keep_large and hello.mode == "postcopy":
            await self.channel.during(preallocate.allocate(self.placer, self.large))

    async def _check_page_faults(self) -> None:
        """Check that page faults can be handled, before the source pauses the workload. Raises UnsupportedError."""
        pids = {segment.pid for region in self.workload.regions for segment in region.segments}
        try:
            await in_thread(page_faults.check, pids)
        except CannotHandleFaults as refused:
            raise UnsupportedError(
                f"cannot use post-copy to this destination: {refused}; use --mode precopy"
            ) from refused

    def _compare(self, regions: list[messages.RegionInfo]) -> None:
        """Compare the regions of both sides. Raises WorkloadError if they differ."""
        ours = [(region.name, region.length) for region in self.workload.regions]
        theirs = [(region.name, region.length) for region in regions]
        if ours != theirs:
            raise WorkloadError(
                f"the memory does not match: the source has {_describe(theirs)}, the destination has "
                f"{_describe(ours)}; start the destination with the options of the source"
            )

    async def _large_pages(self, number: int) -> list[bool]:
        message = await self.channel.receive(messages.LargePages)
        if message.region != number:
            raise ProtocolError(f"bitmap of huge pages of region {message.region}, expected {number}")
        return self._units(number, message.units)

    def _units(self, number: int, packed: bytes) -> list[bool]:
        if number >= len(self.memory.regions):
            raise ProtocolError(f"region {number} of {len(self.memory.regions)}")
        try:
            return messages.unpack_units(packed, -(-self.memory.regions[number].length // LARGE_PAGE))
        except ValueError as error:
            raise ProtocolError(f"units of region {number}: {error}") from error

    async def _step(self) -> bool:
        """Handle one message of the transfer. Return False after the last one."""
        match await self.channel.receive_any():
            case messages.Round(number=number):
                fault_point("destination.in-round")
                await self.channel.during(off_loop(lambda: self.receiver.receive(number), cancel=self.receiver.cancel))
                if self._preparing is None:
                    # Not earlier: the first round takes long, and each later one may be the last.
                    self._preparing = asyncio.create_task(self.workload.prepare_load())
                await self.channel.send(messages.RoundDone(number=number))
            case messages.Hot(region=region, units=units):
                self.hot[region] = [unit for unit, hot in enumerate(self._units(region, units)) if hot]
            case messages.Missing() as missing:
                self.missing.add(missing)
            case messages.State(data=data):
                if len(self.state) + len(data) > messages.MAX_STATE:
                    raise ProtocolError(f"more than {messages.MAX_STATE} bytes of state")
                self.state += data
                self.digest.update(data)
            case messages.StateEnd() as end:
                self._verify_state(end)
                fault_point("destination.state-received")
                return False
            case other:
                raise ProtocolError(f"the peer sent {type(other).__name__} during the transfer")
        return True

    def _verify_state(self, end: messages.StateEnd) -> None:
        if end.length != len(self.state) or end.digest != self.digest.digest():
            raise ProtocolError("the state of the workload was corrupted in transfer")
        if self.placer.missing and self.postcopy is None:
            raise ProtocolError(f"the source has not sent {self.placer.missing} pages")

    async def _make_ready(self, hello: messages.Hello) -> None:
        """Load the device state, populate page tables, and send Ready."""
        self.times.phase("load")
        with self.times.measure("load"):
            await self.channel.during(self._load())
        self.times.phase("populate")
        with self.times.measure("populate"):
            await self.channel.during(self._populate(hello.populate))
        ready = messages.Ready(
            load=self.times.seconds("load"), populate=self.times.seconds("populate"), populated=self._populated()
        )
        fault_point("destination.loaded")
        self.prepared = True
        await self.channel.send(ready)
        fault_point("destination.promised")

    async def _load(self) -> None:
        if self._preparing is not None:
            await self._preparing
        await self.workload.load_state(bytes(self.state))

    async def _populate(self, mode: messages.Populate) -> None:
        placer = self.placer
        if self.postcopy is not None:
            if mode != "none":
                await self.postcopy.populate()
                await self._prefault(self._whole_units())
            return
        for region, units in self.hot.items():
            await off_loop(lambda region=region, units=units: placer.populate(region, units))  # type: ignore[misc]
        try:
            await off_loop(lambda: placer.finish(mode == "all"))
        except PageferryError as error:
            log.warning("page-table entries are created on first access: %s", error)
        if mode != "none":
            await self._prefault(self.hot if mode == "hot" else None)

    def _whole_units(self) -> dict[int, list[int]]:
        """Return the units, per region, that are backed by huge pages and lack no page."""
        missing = [pages.unit_counts() for pages in self.missing.sets]
        large = self.memory.large_units()
        return {
            region: [unit for unit, count in enumerate(counts) if not count and large[region][unit]]
            for region, counts in enumerate(missing)
        }

    async def _prefault(self, units: dict[int, list[int]] | None) -> None:
        """Populate the hypervisor's page tables, which are filled from those of the process and so come after them."""
        try:
            await self.workload.prefault(units)
        except (PageferryError, OSError) as error:
            log.warning("second-stage page-table entries are created on first access: %s", error)

    async def _populate_cold(self) -> None:
        """Populate the huge pages other than those in `hot`, while the workload runs (S1)."""
        placer = self.placer
        for region, hot in self.hot.items():
            units = range(-(-self.memory.regions[region].length // LARGE_PAGE))
            cold = sorted(set(units).difference(hot))
            await off_loop(lambda region=region, cold=cold: placer.populate(region, cold))  # type: ignore[misc]

    def _populated(self) -> messages.Populated:
        large, small, failed, seconds = self.placer.populated
        return messages.Populated(large=large, small=small, failed=failed, seconds=seconds)

    # -- taking over

    async def _take_over(self) -> None:
        """Decide and resume the workload, after the source has committed."""
        fault_point("destination.commit-received")
        # Before the decision: from then on the workload must survive the exit of this process.
        await self.workload.commit(self.verdicts.witness(self.migration))
        self.faults = self.workload.faults()
        self.stays_paused = self.workload.stays_paused
        if self.verdicts.decide(self.migration, Verdict.COMMITTED) is not Verdict.COMMITTED:
            raise Cancelled("the migration was aborted in reply to a recovery request of the source")
        # Resuming may access a missing page after the link is lost, so a reconnecting source is served from here on.
        self.recovery.arrivals = self.postcopy
        fault_point("destination.decided")
        with self.times.measure("resume"):
            await self._resume()
        self.times.stop_all()
        fault_point("destination.resumed")
        with contextlib.suppress(MigrationError):
            await self.channel.send(messages.Running(resume=self.times.seconds("resume")))

    async def _resume(self) -> None:
        """Resume the workload. If it certainly has not run, withdraw the decision: the source still has everything."""
        try:
            await self.workload.resume()
        except WorkloadError as failed:
            if failed.never_ran:
                self.recovery.arrivals = None
                self.verdicts.withdraw(self.migration)
            raise

    async def report(self) -> None:
        """Send the statistics after `run`, and learn whether the source knows that the workload runs here.

        In post-copy, fetch the missing pages first, over any number of links.
        """
        try:
            if self.postcopy is not None:
                self.channel = await self.postcopy.wait_complete()
                await self.channel.send(self.postcopy.arrived())
            else:
                await self._populate_cold()
                await asyncio.sleep(WATCH_FAULTS)
            faults = self._faults_by_now()
            large = await off_loop(self.memory.large_units)
            await self.channel.send(
                messages.Report(
                    # The faults of a thread that has exited since are no longer counted.
                    minor_faults=max(faults.minor - self.faults.minor, 0),
                    major_faults=max(faults.major - self.faults.major, 0),
                    large_pages=sum(map(sum, large)),
                    fallbacks=self.placer.fallbacks,
                    populated=self._populated(),
                    units=[messages.pack_units(units) for units in large],
                )
            )
            await self.channel.receive(messages.Done)
            self._acknowledge()
        except WorkloadDied:
            raise
        except PageferryError as error:
            log.warning("the workload runs on this host; the source may not be informed yet: %s", error)
        finally:
            await self.channel.close()
            self._release()

    def _faults_by_now(self) -> Faults:
        try:
            return self.workload.faults()
        except WorkloadDied:
            if self.postcopy is None:
                raise
            return self.faults  # all pages were received: the workload may have moved on, or exited

    async def _give_up(self, error: BaseException) -> None:
        """Give up the workload: record the decision before it is reported, then discard what was received."""
        if hasattr(self, "receiver"):
            self.receiver.cancel()
        try:
            if self.verdicts.decide(self.migration, Verdict.ABORTED) is Verdict.COMMITTED:
                return  # the workload is ours; the failure does not change that
            await self.channel.abort(_reason(error))
            if isinstance(error, PeerRefused) or not self.prepared:
                self._acknowledge()
            elif not isinstance(error, ConnectionLost):
                # Reported, but not confirmed: the records are kept, so that any later receiver can report it again.
                self.acknowledged.set()
            if self._preparing is not None:
                self._preparing.cancel()
                await asyncio.gather(self._preparing, return_exceptions=True)
            if self.postcopy is not None:
                await self.postcopy.abandon()
            with contextlib.suppress(PageferryError):
                await self.workload.discard()
        finally:
            await self.channel.close()

    def _acknowledge(self) -> None:
        """Delete the records: the source knows the outcome and will not ask."""
        self.verdicts.forget(self.migration)
        self.acknowledged.set()


def _describe(regions: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} of {length >> 20} MiB" for name, length in regions)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled at the destination"
    return str(error) or type(error).__name__
