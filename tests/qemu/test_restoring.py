"""Tests of migrations, checkpoints and scans during a restore, with processes killed at fault points (S8, S10)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.pager import client
from pageferry.pager.launcher import take_over
from pageferry.sharing import api as sharing
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
    """Return the parts of a guest with one QEMU only: the killed processes do not depend on the QEMU version."""
    return newest_parts


@pytest.fixture(scope="module")
def image(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an image of a running guest."""
    return image_of_a_guest(parts, tmp_path_factory.mktemp("image"))


@pytest.fixture
def restored(parts: GuestParts, serial: MakeSerial, registry: Registry) -> Restored:
    """Return a guest that is not restored yet."""
    return Restored("restored", parts, serial("restored"))


@pytest.fixture
def receiver(parts: GuestParts, serial: MakeSerial) -> Callable[[str], Program]:
    """Return a function that starts receivers for the guest, by the name of the guest at the destination."""

    def make(name: str) -> Program:
        command = parts.command(serial(name), *OPTIONS)
        words = ("receive", name, "--detach", "--output", "json", "--", *command)
        return Program("-m", "pageferry", *words, env=moving.environment(None))

    return make


MakeReceiver = Callable[[str], Program]


@asynccontextmanager
async def at(program: Program) -> AsyncIterator[None]:
    """Wait until a program has stopped at its fault point, and continue the program after the block."""
    await asyncio.to_thread(moving.stopped, program)
    yield
    os.kill(program.process.pid, signal.SIGCONT)


async def moved(receiver: Program, migration: Program, serial: Serial, name: str) -> None:
    """Check that the migration completes, and that the guest runs at the destination with correct pages."""
    await asyncio.to_thread(moving.until, migration, "migration")
    assert await asyncio.to_thread(migration.wait) == 0
    assert (await asyncio.to_thread(moving.until, receiver, "received"))["workload"] == name
    await runs_there(serial, name)


async def runs_there(serial: Serial, name: str) -> None:
    """Check that all pages of the guest are correct, and terminate the guest."""
    await serial.passes(2)
    await (await QemuWorkload.attach(name)).discard()


async def bytes_deferred(guest: Restored) -> int:
    status = await guest.status()
    assert status is not None
    return status.deferred


def saving(path: Path, fault: str) -> Program:
    command = ("checkpoint", "restored", str(path), "--output", "json")
    return Program("-m", "pageferry", *command, env=moving.environment(fault))


def test_migration_during_a_restore(
    restored: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    async def run() -> None:
        await restored.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("restored", address, fault="source.part-sent=stop") as migration:
                async with at(migration):
                    assert await bytes_deferred(restored) > 0
                await moved(there, migration, serial("there"), "there")
        assert restored.serial.bad == []

    asyncio.run(run())


def test_migration_while_a_restore_completes(
    restored: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    """Pages are loaded at full speed: when the migration starts, the pager may be running, or may have exited."""

    async def run() -> None:
        with receiver("there") as there:
            address = moving.address_of(there)
            await restored.start(image, eager=True)
            with moving.migrating("restored", address) as migration:
                await moved(there, migration, serial("there"), "there")

    asyncio.run(run())


def test_migration_during_a_restore_while_a_balloon_discards_pages(
    restored: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    async def run() -> None:
        await restored.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("restored", address, fault="source.part-sent=stop") as migration:
                async with at(migration), await Monitor.open(restored.workload.qmp_socket) as monitor:
                    await monitor.execute("balloon", value=160 * MIB)
                    await restored.serial.ticks(3)
                    await monitor.execute("balloon", value=256 * MIB)
                await moved(there, migration, serial("there"), "there")

    asyncio.run(run())


def test_checkpoint_during_a_restore(restored: Restored, image: Path, tmp_path: Path) -> None:
    async def run() -> None:
        await restored.start(image, prefetch=False)
        with saving(tmp_path / "again", "checkpoint.part-brought=stop") as saver:
            async with at(saver):
                assert await bytes_deferred(restored) > 0
                await restored.serial.ticks(2)
            result = await asyncio.to_thread(moving.until, saver, "checkpoint")
            assert await asyncio.to_thread(saver.wait) == 0
        assert result["rounds"] >= 1
        assert ImageFile(tmp_path / "again").verify() == []
        await restored.serial.passes(1)
        await restored.end()
        await restored.start(tmp_path / "again")
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


def test_migration_fails_if_the_pager_is_killed_and_can_be_repeated(
    restored: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    """The migration fails, and the guest waits for missing pages.

    The next pager removes the write traces, and a second migration completes.
    """

    async def run() -> None:
        await restored.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("restored", address, fault="source.part-sent=stop") as migration:
                async with at(migration):
                    await restored.kill_pager()
                assert await asyncio.to_thread(migration.wait) == 32
            assert await asyncio.to_thread(there.wait) == 21
        await take_over(restored.folder)
        await restored.serial.passes(1)
        with receiver("again") as there:
            address = moving.address_of(there)
            with moving.migrating("restored", address) as migration:
                await moved(there, migration, serial("again"), "again")

    asyncio.run(run())


def test_restore_completes_after_migration_and_pager_are_killed(
    restored: Restored, image: Path, receiver: MakeReceiver
) -> None:
    """The guest waits with a write trace installed. A takeover removes the trace and completes the restore."""

    async def run() -> None:
        await restored.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("restored", address, fault="source.part-sent=stop") as migration:
                await asyncio.to_thread(moving.stopped, migration)
                await restored.kill_pager()
                migration.kill()
            assert await asyncio.to_thread(there.wait) == 23
        await take_over(restored.folder)
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


def test_pager_killed_in_the_pause_of_a_migration(
    restored: Restored, image: Path, receiver: MakeReceiver, serial: MakeSerial
) -> None:
    """The pages to send in the pause are already loaded. The migration completes, or the guest stays at the source."""

    async def run() -> None:
        await restored.start(image, prefetch=False)
        with receiver("there") as there:
            address = moving.address_of(there)
            with moving.migrating("restored", address, fault="source.paused=stop") as migration:
                async with at(migration):
                    await restored.kill_pager()
                code = await asyncio.to_thread(migration.wait)
            assert code in (0, 32)
            assert await asyncio.to_thread(there.wait) == (0 if code == 0 else 21)
        if code == 0:
            await runs_there(serial("there"), "there")
            return
        await take_over(restored.folder)
        await restored.serial.passes(2)
        await restored.end()

    asyncio.run(run())


@pytest.mark.parametrize("victim", ["saver", "pager"])
def test_checkpoint_can_be_repeated_after_saver_or_pager_is_killed(
    restored: Restored, image: Path, tmp_path: Path, victim: str
) -> None:
    async def run() -> None:
        await restored.start(image, prefetch=False)
        with saving(tmp_path / "again", "checkpoint.part-brought=stop") as saver:
            await asyncio.to_thread(moving.stopped, saver)
            if victim == "pager":
                await restored.kill_pager()
                os.kill(saver.process.pid, signal.SIGCONT)
                assert await asyncio.to_thread(saver.wait) == 32
                await take_over(restored.folder)
            else:
                saver.kill()
        assert not (tmp_path / "again").exists()
        await restored.serial.passes(1)
        with saving(tmp_path / "again", "none") as saver:
            assert await asyncio.to_thread(saver.wait) == 0
        assert ImageFile(tmp_path / "again").verify() == []
        await restored.end()

    asyncio.run(run())


def test_duplicates_of_deferred_pages_are_found_by_signatures(restored: Restored, image: Path) -> None:
    """The scan loads no pages, and finds the same duplicates as a scan after the restore (S8, S9)."""

    async def execute(command: str) -> None:
        async with await Monitor.open(restored.workload.qmp_socket) as monitor:
            await monitor.execute(command)

    async def run() -> None:
        await restored.start(image, prefetch=False)
        await execute("stop")
        before = await restored.idle()
        early = await sharing.find_async(["restored"])
        after = await restored.status()
        assert before is not None
        assert after is not None
        assert (after.loaded, after.bytes_read) == (before.loaded, before.bytes_read)
        assert after.deferred > 0
        await asyncio.to_thread(client.wait_complete, restored.folder)
        late = await sharing.find_async(["restored"])
        found, expected = ({name: one.pages for name, one in each.classes.items()} for each in (early, late))
        # The scan counts deferred zero pages of units that become huge pages. Without free huge pages, they stay holes.
        assert found.pop("zero") >= expected.pop("zero") > 0
        assert found == expected
        await execute("cont")
        await restored.serial.passes(1)
        await restored.end()

    asyncio.run(run())
