"""Tests of a migration that copies disks: the choice of disks and buffers, and the wait for the copies."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from pageferry._engine import BlockSender
from pageferry.errors import ConnectionLost, NotConverging, ProtocolError
from pageferry.events import ignore
from pageferry.migration import disk_destination, disk_source
from pageferry.migration.destination import Destination
from pageferry.migration.disk_destination import ReceivedDisks
from pageferry.migration.disk_source import MAX_BUFFER, DiskSource, buffer_of, numbers_of
from pageferry.migration.options import Options
from pageferry.migration.transport import messages
from pageferry.workloads.disk_copies import CopiedDisk, CopyProgress
from pageferry.workloads.protocols import DISKS
from pageferry.workloads.qemu import disk_cache

COPYING = Options(copy_disks=True)


def hello(*, disks: bool = True) -> messages.Hello:
    return messages.Hello(
        version=messages.VERSION,
        migration="0" * 32,
        kind="qemu",
        name="web",
        details={DISKS: "record"} if disks else {},
        regions=[messages.RegionInfo(name="ram", length=4096, page_size=4096)],
        streams=1,
        codec="none",
        populate="all",
        keep_large=True,
        mode="precopy",
    )


def welcome(copied: list[int] | None) -> messages.Welcome:
    return messages.Welcome(token=bytes(messages.TOKEN_BYTES), copied=copied)


def test_destination_chooses_the_disks() -> None:
    assert list(numbers_of(welcome([2, 0]), hello(), COPYING)) == [2, 0]
    assert list(numbers_of(welcome([]), hello(), COPYING)) == []
    assert list(numbers_of(welcome(None), hello(disks=False), COPYING)) == []
    assert list(numbers_of(welcome(None), hello(), Options())) == []


@pytest.mark.parametrize(
    ("copied", "options", "said"),
    [
        (None, COPYING, "release of the receiver is older"),
        ([1, 1], COPYING, "a disk twice"),
        ([0], Options(), "which this migration does not send"),
    ],
)
def test_unexpected_choice_is_rejected(copied: list[int] | None, options: Options, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        numbers_of(welcome(copied), hello(), options)


def test_choice_of_a_peer_is_bounded() -> None:
    for copied in ([64], [-1], [*range(64), 0]):
        encoded = messages.encode(welcome(copied))[4:]
        with pytest.raises(ValueError, match="copied"):
            messages.decode(encoded)


def test_bytes_in_flight_can_be_sent_in_half_of_the_downtime() -> None:
    limited = Options(copy_disks=True, bandwidth=8 << 20, max_downtime=0.5)
    assert 2 * buffer_of(limited, 2) == (8 << 20) * 0.5 / 2
    assert buffer_of(Options(copy_disks=True), 2) == MAX_BUFFER


MIB = 1 << 20
STALL = 0.5


class Copies:
    """Copies whose progress the test sets."""

    disks: Sequence[CopiedDisk] = ()

    def __init__(self) -> None:
        self.now = CopyProgress(0, 0, ready=False)

    async def start(self, carry: Callable[..., object]) -> None:
        pass

    async def progress(self) -> CopyProgress:
        return self.now

    async def pause(self) -> None:
        pass

    async def resume(self) -> None:
        pass

    async def finish(self) -> None:
        pass

    async def cancel(self) -> None:
        pass


def waits(monkeypatch: pytest.MonkeyPatch, changes: Callable[[Copies, DiskSource], Awaitable[Any]]) -> None:
    """Run `changes` with copies that have started, and with short intervals and limits."""
    monkeypatch.setattr(disk_source, "STALL", STALL)
    monkeypatch.setattr(disk_source, "INTERVAL", 0.02)

    async def run() -> None:
        copies = Copies()
        options = Options(copy_disks=True, max_downtime=0.3)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sender = BlockSender([ours.fileno()], codec="none", timeout=10.0)
        source = DiskSource(copies, [], sender, options, ignore)
        await source.start()
        try:
            await changes(copies, source)
        finally:
            await source.abandon()

    asyncio.run(run())


def test_copies_that_decrease_do_not_count_as_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def decrease(copies: Copies, source: DiskSource) -> None:
        waiting = asyncio.create_task(source.wait_small(100 * MIB))
        await asyncio.sleep(STALL / 2)  # QEMU does not know the number of bytes yet
        for done in range(20):
            copies.now = CopyProgress(done * MIB, 20 * MIB, ready=False)
            await asyncio.sleep(STALL / 10)
        copies.now = CopyProgress(20 * MIB, 20 * MIB, ready=True)
        await waiting

    waits(monkeypatch, decrease)


def test_burst_of_writes_after_a_long_round_does_not_count_as_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def burst(copies: Copies, source: DiskSource) -> None:
        copies.now = CopyProgress(19 * MIB, 20 * MIB, ready=True)
        await asyncio.sleep(2 * STALL)
        copies.now = CopyProgress(20 * MIB, 120 * MIB, ready=True)
        waiting = asyncio.create_task(source.wait_small(100 * MIB))
        await asyncio.sleep(STALL / 2)
        copies.now = CopyProgress(119 * MIB, 120 * MIB, ready=True)
        await waiting

    waits(monkeypatch, burst)


def test_copies_that_do_not_decrease_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stay(copies: Copies, source: DiskSource) -> None:
        copies.now = CopyProgress(20 * MIB, 120 * MIB, ready=True)
        with pytest.raises(NotConverging, match="100 MiB remain"):
            await source.wait_small(100 * MIB)

    waits(monkeypatch, stay)


class Flushed:
    """Exports that count flushes."""

    def __init__(self) -> None:
        self.flushes = 0

    async def flush(self) -> None:
        self.flushes += 1

    async def close(self) -> None: ...


def test_received_disks_are_flushed_while_data_is_received(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_destination, "_FLUSH_INTERVAL", 0.01)

    async def receive() -> None:
        exports: Any = Flushed()
        received = ReceivedDisks(exports)
        transferred = 0
        monkeypatch.setattr(received, "transferred", lambda: transferred)
        received._start_flushing()
        await asyncio.sleep(0.05)
        assert exports.flushes == 0, "nothing has been received"
        transferred = 1
        await asyncio.sleep(0.1)
        assert exports.flushes == 1
        await received.complete(1.0)
        transferred = 2
        await asyncio.sleep(0.1)
        assert exports.flushes == 1, "the copies are complete"

    asyncio.run(receive())


class Slow(Flushed):
    """Exports whose flush lasts until it is cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()
        self.ended = False

    async def flush(self) -> None:
        await super().flush()
        self.begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            self.ended = True


async def flushing(exports: Any, monkeypatch: pytest.MonkeyPatch) -> ReceivedDisks:
    """Return disks that are being flushed."""
    received = ReceivedDisks(exports)
    monkeypatch.setattr(disk_destination, "_FLUSH_INTERVAL", 0.001)
    monkeypatch.setattr(received, "transferred", lambda: 1)
    received._start_flushing()
    await exports.begun.wait()
    return received


@pytest.mark.parametrize("timeout", [False, True])
def test_flush_ends_if_giving_up_fails_before_the_disks_are_abandoned(
    monkeypatch: pytest.MonkeyPatch, timeout: bool
) -> None:
    class Channel:
        closed = False

        async def abort(self, _reason: str) -> None:
            if timeout:
                await asyncio.sleep(60)
            raise OSError("the run directory is full")

        async def close(self) -> None:
            self.closed = True

    async def run() -> None:
        exports, channel = Slow(), Channel()
        decisions = SimpleNamespace(decide=lambda _migration, decision: decision)
        destination: Any = Destination.__new__(Destination)
        destination.host = SimpleNamespace(decisions=decisions)
        destination._transfer, destination._disks = None, await flushing(exports, monkeypatch)
        incoming: Any = SimpleNamespace(channel=channel, hello=hello())
        with pytest.raises(TimeoutError if timeout else OSError):
            async with asyncio.timeout(0.05 if timeout else 60):
                await destination._give_up(incoming, ConnectionLost("lost"))
        assert channel.closed
        assert exports.ended

    asyncio.run(run())


def test_cancelled_flush_ends_after_the_current_file(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    begun = threading.Event()

    def flush(place: str) -> None:
        flushed.append(place)
        begun.set()
        time.sleep(0.1)

    monkeypatch.setattr(disk_cache, "_flush", flush)

    async def run() -> None:
        task = asyncio.create_task(disk_cache.flush_beside(["a", "b"]))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.3)

    asyncio.run(run())
    assert flushed == ["a"]
