"""The destination of a migration: places pages while the workload runs elsewhere, then takes it over.

Read `Destination.run` first. Nobody uses the memory here until the source has committed, so pages are received in
place and verified there; one that is wrong ends the migration, and the source runs on.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from logging import getLogger

from pageferry._engine import BlockReceiver, Placer
from pageferry.errors import (
    Cancelled,
    ConnectionLost,
    MigrationError,
    PageferryError,
    PeerRefused,
    ProtocolError,
    UsageError,
    WorkloadDied,
    WorkloadError,
)
from pageferry.host.faults import fault_point
from pageferry.migration import messages
from pageferry.migration.channel import Channel
from pageferry.migration.connection import Reception
from pageferry.migration.native import off_loop, to_the_end
from pageferry.migration.ownership import Verdict, Verdicts
from pageferry.migration.stopwatch import Stopwatch
from pageferry.workloads.base import LARGE_PAGE, Workload
from pageferry.workloads.memory import Memory

log = getLogger(__name__)

POPULATE_WORKERS = 1
"""Threads that map complete units while more pages come; mapping is far quicker than receiving."""
WATCH_FAULTS = 1.0
"""Seconds after the workload has resumed in which its faults are counted."""

Prepare = Callable[[messages.Hello], Awaitable[Workload]]
"""Makes or names the workload that is to be received; raises UsageError or WorkloadError to refuse."""


class Destination:
    """Receives one workload. `prepare` is called for every source that asks, until one is accepted."""

    def __init__(self, reception: Reception, prepare: Prepare, verdicts: Verdicts, patience: float = 30.0) -> None:
        self.reception = reception
        self.prepare = prepare
        self.verdicts = verdicts
        self.patience = patience
        self.times = Stopwatch()
        self.state = bytearray()
        self.digest = blake2b(digest_size=32)
        self.promised = False
        """Ready was sent: the source may commit at any moment, and may come and ask."""
        self.settled = asyncio.Event()
        """Set once the source knows what became of the migration."""
        self._attendant: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None

    async def run(self) -> Workload:
        """Receive a workload; it runs here when this returns. Raises MigrationError when it stays at the source.

        Whoever else connects is attended to until `close`.
        """
        self.channel, hello = await self._accept()
        self.migration = hello.migration
        self._attendant = asyncio.create_task(self._attend())
        try:
            await self._receive(hello)
            await self.channel.receive(messages.Commit)
            await to_the_end(self._take_over())
        except BaseException as error:
            await to_the_end(self._give_up(error))
            raise
        return self.workload

    async def finish(self) -> None:
        """`report`, then wait until the source knows that the workload runs here."""
        await self.report()
        await self.settled.wait()

    def close(self) -> None:
        """Attend to nobody any more."""
        if self._attendant is not None:
            self._attendant.cancel()

    # -- whoever connects

    async def _accept(self) -> tuple[Channel, messages.Hello]:
        while True:
            channel, first = await self.reception.control()
            try:
                match first:
                    case messages.Hello() as hello:
                        messages.check_version(hello.version)
                        self.workload = await self.prepare(hello)
                        channel.limit = messages.MAX_MESSAGE
                        return channel, hello
                    case _:
                        await self._answer(channel, first)
            except (PageferryError, OSError) as error:
                log.warning("a source was refused: %s", error)
                await channel.abort(str(error))
            await channel.close()

    async def _attend(self) -> None:
        """Answer and refuse those that come while a workload is received, and after."""
        while True:
            channel, first = await self.reception.control()
            try:
                if isinstance(first, messages.Hello):
                    raise UsageError("this receiver receives another workload, or has done so already")
                await self._answer(channel, first)
            except PageferryError as error:
                await channel.abort(str(error))
            finally:
                await channel.close()

    async def _answer(self, channel: Channel, question: messages.AnyMessage) -> None:
        """Tell a source who owns the workload. Where nothing was decided it is decided now: for the source."""
        if not isinstance(question, messages.Recover):
            raise ProtocolError(f"the peer began with {type(question).__name__}")
        messages.check_version(question.version)
        if not self.verdicts.knows(question.migration):
            await channel.send(messages.Outcome(owner="unknown"))
            return
        verdict = self.verdicts.decide(question.migration, Verdict.ABORTED)
        await channel.send(messages.Outcome(owner="destination" if verdict is Verdict.COMMITTED else "source"))
        if self._attendant is not None and question.migration == self.migration:
            self.settled.set()

    # -- receiving

    async def _receive(self, hello: messages.Hello) -> None:
        self.verdicts.begin(hello.migration)
        fault_point("destination.accepted")
        self.memory = Memory(self.workload)
        self._compare(hello.regions)
        streams = await self._streams(hello.streams)
        try:
            await self._open_placer(hello)
            self.receiver = BlockReceiver([stream.fileno() for stream in streams], self.placer, self.patience)
        finally:
            for stream in streams:
                stream.close()  # the engine has a duplicate
        self.hot: dict[int, list[int]] = {}
        while await self._step():
            pass
        await self._make_ready(hello)

    async def _streams(self, count: int) -> list[socket.socket]:
        token = secrets.token_bytes(messages.TOKEN_BYTES)
        self.reception.expect(token)
        await self.channel.send(messages.Welcome(token=token))
        return await self.channel.during(self.reception.streams(token, count, self.patience))

    async def _open_placer(self, hello: messages.Hello) -> None:
        large = [await self._large_pages(number) for number in range(len(hello.regions))]
        self.placer = Placer(
            [
                (mapping, region.page_size, units)
                for mapping, region, units in zip(self.memory.mappings, self.memory.regions, large, strict=True)
            ],
            self.memory.segments,
            hello.keep_large,
            POPULATE_WORKERS if hello.populate == "all" else 0,
        )

    def _compare(self, regions: list[messages.RegionInfo]) -> None:
        """Region by region, both sides must have the same."""
        ours = [(region.name, region.length) for region in self.memory.regions]
        theirs = [(region.name, region.length) for region in regions]
        if ours != theirs:
            raise WorkloadError(
                f"the memory does not match: the source has {_describe(theirs)}, the destination {_describe(ours)}; "
                f"start the destination with the same options"
            )

    async def _large_pages(self, number: int) -> list[bool]:
        message = await self.channel.receive(messages.LargePages)
        if message.region != number:
            raise ProtocolError(f"large pages of region {message.region}, expected {number}")
        return self._units(number, message.units)

    def _units(self, number: int, packed: bytes) -> list[bool]:
        if number >= len(self.memory.regions):
            raise ProtocolError(f"region {number} of {len(self.memory.regions)}")
        try:
            return messages.unpack_units(packed, -(-self.memory.regions[number].length // LARGE_PAGE))
        except ValueError as error:
            raise ProtocolError(f"units of region {number}: {error}") from error

    async def _step(self) -> bool:
        """One message of the transfer; False after the last."""
        match await self.channel.receive_any():
            case messages.Round(number=number):
                fault_point("destination.in-round")
                if number > 1 and self._preparing is None:
                    # The first round takes long; from now on the last one may be near.
                    self._preparing = asyncio.create_task(self.workload.prepare_load())
                await self.channel.during(off_loop(lambda: self.receiver.receive(number), cancel=self.receiver.cancel))
                await self.channel.send(messages.RoundDone(number=number))
            case messages.Hot(region=region, units=units):
                self.hot[region] = [unit for unit, hot in enumerate(self._units(region, units)) if hot]
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
            raise ProtocolError("the state of the workload was damaged on the way")
        if self.placer.missing:
            raise ProtocolError(f"the source forgot {self.placer.missing} pages")

    async def _make_ready(self, hello: messages.Hello) -> None:
        """Load the state and populate page tables, then promise to be ready."""
        with self.times.measure("load"):
            await self.channel.during(self._load())
        with self.times.measure("populate"):
            await self.channel.during(self._populate(hello.populate))
        ready = messages.Ready(
            load=self.times.seconds("load"), populate=self.times.seconds("populate"), populated=self._populated()
        )
        fault_point("destination.loaded")
        self.promised = True
        await self.channel.send(ready)
        fault_point("destination.promised")

    async def _load(self) -> None:
        if self._preparing is not None:
            await self._preparing
        await self.workload.load_state(bytes(self.state))

    async def _populate(self, mode: messages.Populate) -> None:
        placer = self.placer
        for region, units in self.hot.items():
            await off_loop(lambda region=region, units=units: placer.populate(region, units))  # type: ignore[misc]
        try:
            await off_loop(lambda: placer.finish(mode == "all"))
        except PageferryError as error:
            log.warning("page tables are left to the first access: %s", error)
        if mode != "none":
            await self._prefault(self.hot if mode == "hot" else None)

    async def _prefault(self, units: dict[int, list[int]] | None) -> None:
        """Those of the hypervisor. They wait for those of the process, which they are filled from."""
        try:
            await self.workload.prefault(units)
        except (PageferryError, OSError) as error:
            log.warning("the hypervisor's page tables are left to the first access: %s", error)

    async def _populate_rest(self) -> None:
        """After `hot`, the other large pages, while the workload runs (S1)."""
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
        """The source has committed. Decide, then run it."""
        fault_point("destination.commit-received")
        # First it must survive us, for once it is decided that it is ours it may not be lost any more.
        await self.workload.commit(self.verdicts.witness(self.migration))
        self.faults = self.workload.faults()
        if self.verdicts.decide(self.migration, Verdict.COMMITTED) is not Verdict.COMMITTED:
            raise Cancelled("the source was told meanwhile that this migration is over")
        fault_point("destination.decided")
        with self.times.measure("resume"):
            await self._resume()
        fault_point("destination.resumed")
        with contextlib.suppress(MigrationError):
            await self.channel.send(messages.Running(resume=self.times.seconds("resume")))

    async def _resume(self) -> None:
        """Run it. One that has died before it could is given back: the source still has everything."""
        try:
            await self.workload.resume()
        except WorkloadDied as died:
            if died.never_ran:
                self.verdicts.withdraw(self.migration)
            raise

    async def report(self) -> None:
        """After `run`: tell the source how it went, and learn whether it knows that the workload runs here."""
        try:
            await self._populate_rest()
            await asyncio.sleep(WATCH_FAULTS)
            faults = self.workload.faults()
            large = await off_loop(self.memory.large_units)
            await self.channel.send(
                messages.Report(
                    # A thread that has ended meanwhile counts no more.
                    minor_faults=max(faults.minor - self.faults.minor, 0),
                    major_faults=max(faults.major - self.faults.major, 0),
                    large_pages=sum(map(sum, large)),
                    fallbacks=self.placer.fallbacks,
                    populated=self._populated(),
                    units=[messages.pack_units(units) for units in large],
                )
            )
            await self.channel.receive(messages.Done)
            self._settle()
        except PageferryError as error:
            log.warning("the workload runs here; the source may not know it yet: %s", error)
        finally:
            await self.channel.close()

    async def _give_up(self, error: BaseException) -> None:
        """It stays at the source: decide so before anybody is told, then leave nothing behind."""
        if hasattr(self, "receiver"):
            self.receiver.cancel()
        try:
            if self.verdicts.decide(self.migration, Verdict.ABORTED) is Verdict.COMMITTED:
                return  # the failure is ours, and so is the workload
            await self.channel.abort(_reason(error))
            if isinstance(error, PeerRefused) or not self.promised:
                self._settle()
            elif not isinstance(error, ConnectionLost):
                # Told, but not for certain: who receives here next can tell it again.
                self.settled.set()
            if self._preparing is not None:
                self._preparing.cancel()
                await asyncio.gather(self._preparing, return_exceptions=True)
            with contextlib.suppress(PageferryError):
                await self.workload.discard()
        finally:
            await self.channel.close()

    def _settle(self) -> None:
        """The source knows: nobody will ask."""
        self.verdicts.forget(self.migration)
        self.settled.set()


def _describe(regions: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} of {length >> 20} MiB" for name, length in regions)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled at the destination"
    return str(error) or type(error).__name__
