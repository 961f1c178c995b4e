"""The destination of a migration: places pages while the workload runs elsewhere, then takes it over.

Read `Destination.run` first. Nobody uses the memory here until the source has committed, so pages are received in
place and verified there; one that is wrong ends the migration, and the source runs on.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from logging import getLogger
from typing import assert_never

from pageferry._engine import BlockReceiver, Placer
from pageferry.errors import (
    Cancelled,
    ConnectionLost,
    MigrationError,
    PageferryError,
    PeerRefused,
    ProtocolError,
    UnsupportedError,
    UsageError,
    WorkloadError,
)
from pageferry.migration import messages
from pageferry.migration.channel import Channel
from pageferry.migration.connection import Reception
from pageferry.migration.memory import Memory
from pageferry.migration.native import off_loop
from pageferry.migration.ownership import Verdict, Verdicts
from pageferry.migration.stopwatch import Stopwatch
from pageferry.workloads.base import LARGE_PAGE, Workload

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
        self.promised = False
        """Ready was sent: the source may commit at any moment, and may come and ask."""
        self.settled = False
        """The source knows what became of the migration."""

    async def run(self) -> Workload:
        """Receive a workload; it runs here when this returns. Raises MigrationError when it stays at the source."""
        channel, hello = await self._accept()
        self.migration, self.channel = hello.migration, channel
        try:
            try:
                await self._receive(hello)
                await self._take_over()
            except BaseException as error:
                await asyncio.shield(self._give_up(error))
                raise
            await self._report()
        finally:
            await asyncio.shield(channel.close())
        return self.workload

    # -- until somebody is accepted

    async def _accept(self) -> tuple[Channel, messages.Hello]:
        while True:
            channel = Channel(*await self.reception.control(), self.patience)
            try:
                hello = await self._greet(channel)
                if hello is not None:
                    return channel, hello
            except PageferryError as error:
                log.warning("a source was refused: %s", error)
                await channel.abort(str(error))
            await channel.close()

    async def _greet(self, channel: Channel) -> messages.Hello | None:
        """The first message of a source, if it is one that we will receive."""
        match await channel.receive_any():
            case messages.Hello() as hello:
                if hello.version != messages.VERSION:
                    raise UnsupportedError(
                        f"the source speaks version {hello.version} of the protocol, the destination version "
                        f"{messages.VERSION}: use the same release of pageferry on both sides"
                    )
                self.workload = await self.prepare(hello)
                return hello
            case messages.Recover() as question:
                await answer(channel, question, self.verdicts)
                return None
            case other:
                raise ProtocolError(f"the peer began with {type(other).__name__}")

    # -- receiving

    async def _receive(self, hello: messages.Hello) -> None:
        self.verdicts.begin(hello.migration)
        self.memory = Memory(self.workload)
        self._compare(hello.regions)
        token = secrets.token_bytes(messages.TOKEN_BYTES)
        self.reception.expect(token)
        await self.channel.send(messages.Welcome(token=token))
        streams = await self.channel.during(self.reception.streams(token, hello.streams, self.patience))
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
        self.receiver = BlockReceiver([stream.fileno() for stream in streams], self.placer, self.patience)
        for stream in streams:
            stream.close()  # the engine has a duplicate
        self.hot: dict[int, list[int]] = {}
        while await self._step():
            pass
        await self._make_ready(hello)

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
                await self.channel.during(off_loop(lambda: self.receiver.receive(number), cancel=self.receiver.cancel))
                await self.channel.send(messages.RoundDone(number=number))
            case messages.Hot(region=region, units=units):
                self.hot[region] = [unit for unit, hot in enumerate(self._units(region, units)) if hot]
            case messages.State(data=data):
                if len(self.state) + len(data) > messages.MAX_STATE:
                    raise ProtocolError(f"more than {messages.MAX_STATE} bytes of state")
                self.state += data
            case messages.StateEnd() as end:
                self._verify_state(end)
                return False
            case other:
                raise ProtocolError(f"the peer sent {type(other).__name__} during the transfer")
        return True

    def _verify_state(self, end: messages.StateEnd) -> None:
        digest = blake2b(self.state, digest_size=32).digest()
        if end.length != len(self.state) or end.digest != digest:
            raise ProtocolError("the state of the workload was damaged on the way")
        if self.placer.missing:
            raise ProtocolError(f"the source forgot {self.placer.missing} pages")

    async def _make_ready(self, hello: messages.Hello) -> None:
        """Load the state and populate page tables, then promise to be ready."""
        with self.times.measure("load"):
            await self.channel.during(self.workload.load_state(bytes(self.state)))
        with self.times.measure("populate"):
            await self.channel.during(self._populate(hello.populate))
        ready = messages.Ready(
            load=self.times.seconds("load"), populate=self.times.seconds("populate"), populated=self._populated()
        )
        self.promised = True
        await self.channel.send(ready)

    async def _populate(self, mode: messages.Populate) -> None:
        placer = self.placer
        for region, units in self.hot.items():
            await off_loop(lambda region=region, units=units: placer.populate(region, units))  # type: ignore[misc]
        try:
            await off_loop(lambda: placer.finish(mode == "all"))
        except PageferryError as error:
            log.warning("page tables are left to the first access: %s", error)

    def _populated(self) -> messages.Populated:
        large, small, failed, seconds = self.placer.populated
        return messages.Populated(large=large, small=small, failed=failed, seconds=seconds)

    # -- taking over

    async def _take_over(self) -> None:
        await self.channel.receive(messages.Commit)
        # First it must survive us, for once it is decided that it is ours it may not be lost any more.
        await self.workload.commit()
        if self.verdicts.decide(self.migration, Verdict.COMMITTED) is not Verdict.COMMITTED:
            raise Cancelled("the source was told meanwhile that this migration is over")
        await asyncio.shield(self._resume())

    async def _resume(self) -> None:
        self.faults = self.workload.faults()
        with self.times.measure("resume"):
            await self.workload.resume()
        with contextlib.suppress(MigrationError):
            await self.channel.send(messages.Running(resume=self.times.seconds("resume")))

    async def _report(self) -> None:
        """Tell the source how it went, and learn whether it knows that the workload runs here."""
        try:
            await asyncio.sleep(WATCH_FAULTS)
            faults = self.workload.faults()
            large = await off_loop(self.memory.large_units)
            await self.channel.send(
                messages.Report(
                    minor_faults=faults.minor - self.faults.minor,
                    major_faults=faults.major - self.faults.major,
                    large_pages=sum(map(sum, large)),
                    fallbacks=self.placer.fallbacks,
                    populated=self._populated(),
                )
            )
            await self.channel.receive(messages.Done)
            self.settled = True
        except PageferryError as error:
            log.warning("the workload runs here; the source may not know it yet: %s", error)

    async def _give_up(self, error: BaseException) -> None:
        """It stays at the source: decide so before anybody is told, then leave nothing behind."""
        if hasattr(self, "receiver"):
            self.receiver.cancel()
        if self.verdicts.decide(self.migration, Verdict.ABORTED) is Verdict.COMMITTED:
            return  # the failure is ours, and so is the workload
        told = isinstance(error, PeerRefused) or not self.promised
        await self.channel.abort(_reason(error))
        self.settled = told or not isinstance(error, ConnectionLost)
        with contextlib.suppress(PageferryError):
            await self.workload.discard()

    async def answer_questions(self) -> None:
        """Answer sources that ask what became of this migration, until one has been told."""
        while not self.settled:
            channel = Channel(*await self.reception.control(), self.patience)
            try:
                match await channel.receive_any():
                    case messages.Recover() as question:
                        await answer(channel, question, self.verdicts)
                        self.settled = question.migration == self.migration
                    case _:
                        raise UsageError("this receiver has received its workload, and receives no other")
            except PageferryError as error:
                await channel.abort(str(error))
            finally:
                await channel.close()


async def answer(channel: Channel, question: messages.Recover, verdicts: Verdicts) -> None:
    """Tell a source who owns the workload. Where nothing was decided it is decided now: for the source."""
    if not verdicts.knows(question.migration):
        await channel.send(messages.Outcome(owner="unknown"))
        return
    verdict = verdicts.decide(question.migration, Verdict.ABORTED)
    match verdict:
        case Verdict.COMMITTED:
            await channel.send(messages.Outcome(owner="destination"))
        case Verdict.ABORTED:
            await channel.send(messages.Outcome(owner="source"))
        case _:
            assert_never(verdict)


def _describe(regions: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} of {length >> 20} MiB" for name, length in regions)


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled at the destination"
    return str(error) or type(error).__name__
