"""Guests that are moved and saved while their restore is under way, and all that can die meanwhile (S8, S10)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pageferry.checkpoints.restore import take_over
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.sharing import api as sharing
from pageferry.workloads import deferred
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.guest.restored import OPTIONS, Restored, image_of_a_guest
from tests.guest.serial import Serial
from tests.kernel import moving
from tests.kernel.programs import Program

MakeSerial = Callable[[str], Serial]
MIB = 1 << 20


@pytest.fixture(scope="module")
def parts(newest_parts: GuestParts) -> GuestParts:
    """What dies here is ours."""
    return newest_parts


@pytest.fixture(scope="module")
def image(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of a guest at work."""
    return image_of_a_guest(parts, tmp_path_factory.mktemp("image"))


@pytest.fixture
def coming(parts: GuestParts, serial: MakeSerial, registry: Registry) -> Restored:
    """The guest, still to be restored."""
    return Restored("coming", parts, serial("coming"))


@pytest.fixture
def receiver(parts: GuestParts, serial: MakeSerial) -> Callable[[str], Program]:
    """Makes receivers for it, by the name that it has there."""

    def make(name: str) -> Program:
        command = parts.command(serial(name), *OPTIONS)
        words = ("receive", name, "--detach", "--output", "json", "--", *command)
        return Program("-m", "pageferry", *words, env=moving.environment(None))

    return make


MakeReceiver = Callable[[str], Program]


@asynccontextmanager
async def at(program: Program) -> AsyncIterator[None]:
    """While it stands at its fault point; then it goes on."""
    await asyncio.to_thread(moving.stopped, program)
    yield
    os.kill(program.process.pid, signal.SIGCONT)


async def moved(receiver: Program, migration: Program, serial: Serial, name: str) -> None:
    """It runs there, and every page of it is right."""
    await asyncio.to_thread(moving.until, migration, "migration")
    assert await asyncio.to_thread(migration.wait) == 0
    assert (await asyncio.to_thread(moving.until, receiver, "received"))["workload"] == name
    await runs_there(serial, name)


async def runs_there(serial: Serial, name: str) -> None:
    """Every page of it is right; then it ends."""
    await serial.passes(2)
    await (await QemuWorkload.attach(name)).discard()


async def still_to_come(guest: Restored) -> int:
    status = await guest.status()
    assert status is not None
    return status.deferred


def saving(path: Path, fault: str) -> Program:
    command = ("checkpoint", "coming", str(path), "--output", "json")
    return Program("-m", "pageferry", *command, env=moving.environment(fault))


def test_it_moves_while_it_is_restored(
    coming: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    async def run() -> None:
        await coming.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("coming", address, fault="source.part-sent=stop") as migration:
                async with at(migration):
                    assert await still_to_come(coming) > 0
                await moved(there, migration, serial("there"), "there")
        assert coming.serial.bad == []

    asyncio.run(run())


def test_it_moves_while_its_restore_ends(
    coming: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    """Everything comes at full speed: whether the pager is held, has ended, or is about to is a matter of luck."""

    async def run() -> None:
        with receiver("there") as there:
            address = moving.address_of(there)
            await coming.start(image, eager=True)
            with moving.migrating("coming", address) as migration:
                await moved(there, migration, serial("there"), "there")

    asyncio.run(run())


def test_it_moves_while_a_balloon_takes_pages(
    coming: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    async def run() -> None:
        await coming.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("coming", address, fault="source.part-sent=stop") as migration:
                async with at(migration), await Monitor.open(coming.workload.qmp_socket) as monitor:
                    await monitor.execute("balloon", value=160 * MIB)
                    await coming.serial.ticks(3)
                    await monitor.execute("balloon", value=256 * MIB)
                await moved(there, migration, serial("there"), "there")

    asyncio.run(run())


def test_it_is_saved_while_it_is_restored(coming: Restored, image: Path, tmp_path: Path) -> None:
    async def run() -> None:
        await coming.start(image, prefetch=False)
        with saving(tmp_path / "again", "checkpoint.part-brought=stop") as saver:
            async with at(saver):
                assert await still_to_come(coming) > 0
                await coming.serial.ticks(2)
            result = await asyncio.to_thread(moving.until, saver, "checkpoint")
            assert await asyncio.to_thread(saver.wait) == 0
        assert result["rounds"] >= 1
        assert ImageFile(tmp_path / "again").verify() == []
        await coming.serial.passes(1)
        await coming.end()
        await coming.start(tmp_path / "again")
        await coming.serial.passes(2)
        await coming.end()

    asyncio.run(run())


def test_the_pager_dies_while_it_moves(
    coming: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    """The move fails, the guest waits, and the next pager takes the traces off: then it can be moved."""

    async def run() -> None:
        await coming.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("coming", address, fault="source.part-sent=stop") as migration:
                async with at(migration):
                    await coming.kill_pager()
                assert await asyncio.to_thread(migration.wait) == 32
            assert await asyncio.to_thread(there.wait) == 21
        await take_over(coming.folder)
        await coming.serial.passes(1)
        with receiver("again") as there:
            address = moving.address_of(there)
            with moving.migrating("coming", address) as migration:
                await moved(there, migration, serial("again"), "again")

    asyncio.run(run())


def test_both_die_while_it_moves(coming: Restored, image: Path, receiver: MakeReceiver) -> None:
    """What they leave is a guest that waits, under a trace; after a takeover it is restored, and nothing is left."""

    async def run() -> None:
        await coming.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("coming", address, fault="source.part-sent=stop") as migration:
                await asyncio.to_thread(moving.stopped, migration)
                await coming.kill_pager()
                migration.kill()
            assert await asyncio.to_thread(there.wait) == 23
        await take_over(coming.folder)
        await coming.serial.passes(2)
        await coming.end()

    asyncio.run(run())


def test_the_pager_dies_when_it_is_paused(
    coming: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    """What is sent in the pause has come before: the move ends, or it fails and the guest runs on here, as ever."""

    async def run() -> None:
        await coming.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("coming", address, fault="source.paused=stop") as migration:
                async with at(migration):
                    await coming.kill_pager()
                code = await asyncio.to_thread(migration.wait)
            assert code in (0, 32)
            assert await asyncio.to_thread(there.wait) == (0 if code == 0 else 21)
        if code == 0:
            await runs_there(serial("there"), "there")
            return
        await take_over(coming.folder)
        await coming.serial.passes(2)
        await coming.end()

    asyncio.run(run())


@pytest.mark.parametrize("victim", ["saver", "pager"])
def test_somebody_dies_while_it_is_saved(coming: Restored, image: Path, tmp_path: Path, victim: str) -> None:
    async def run() -> None:
        await coming.start(image, prefetch=False)
        with saving(tmp_path / "again", "checkpoint.part-brought=stop") as saver:
            await asyncio.to_thread(moving.stopped, saver)
            if victim == "pager":
                await coming.kill_pager()
                os.kill(saver.process.pid, signal.SIGCONT)
                assert await asyncio.to_thread(saver.wait) == 32
                await take_over(coming.folder)
            else:
                saver.kill()
        assert not (tmp_path / "again").exists()
        await coming.serial.passes(1)
        with saving(tmp_path / "again", "none") as saver:
            assert await asyncio.to_thread(saver.wait) == 0
        assert ImageFile(tmp_path / "again").verify() == []
        await coming.end()

    asyncio.run(run())


def test_what_it_shares_is_found_by_signatures(coming: Restored, image: Path) -> None:
    """Nothing comes for it, and it is what is found when all of it is there (S8, S9)."""

    async def told(command: str) -> None:
        async with await Monitor.open(coming.workload.qmp_socket) as monitor:
            await monitor.execute(command)

    async def run() -> None:
        await coming.start(image, prefetch=False)
        await told("stop")
        await asyncio.sleep(1)  # the rest of storage blocks that it has accessed still comes
        before = await coming.status()
        early = await sharing.find(["coming"])
        after = await coming.status()
        assert before is not None
        assert after is not None
        assert (after.loaded, after.bytes_read) == (before.loaded, before.bytes_read)
        assert after.deferred > 0
        await asyncio.to_thread(deferred.settle, coming.folder)
        late = await sharing.find(["coming"])
        found, expected = ({name: one.pages for name, one in each.classes.items()} for each in (early, late))
        # Zeros are foreseen where there will be a large page; where the host has none, they stay holes.
        assert found.pop("zero") >= expected.pop("zero") > 0
        assert found == expected
        await told("cont")
        await coming.serial.passes(1)
        await coming.end()

    asyncio.run(run())
