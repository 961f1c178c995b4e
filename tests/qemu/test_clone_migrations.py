"""Migrations of clones (S2, S10): private pages and a reference to the image, or all pages without the image."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry.errors import PeerRefused, UnsupportedError, WorkloadError
from pageferry.host import smaps
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.migration.events import MigrationResult, SetupEvent
from pageferry.workloads.bases import describe_bases
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.clones import Clone, contents, save, until_gone
from tests.guest.machines import GuestParts
from tests.guest.receiving import Receiver, receiving
from tests.guest.restored import image_of_a_guest
from tests.guest.serial import Serial
from tests.kernel import moving

MakeSerial = Callable[[str], Serial]
Make = Callable[[str], Clone]
PAGE = 4096


@pytest.fixture(scope="module")
def image(parts: GuestParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an image of a running guest."""
    return image_of_a_guest(parts, tmp_path_factory.mktemp("image"))


@pytest.fixture
def clone(parts: GuestParts, serial: MakeSerial, registry: Registry) -> Make:
    """Return a function that creates a `Clone` by name. The test starts the guest."""
    return lambda name: Clone(name, parts, serial(name))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Return the run directory of the destination."""
    return tmp_path / "there"


def compared(source: QemuWorkload, receiver: Receiver) -> list[int]:
    """Compare the memory of both sides at the end of the switch-over. Return a list, to which the number of compared
    slices is added."""
    slices: list[int] = []
    load_state = receiver.guest.load_state

    async def observed(state: bytes) -> None:
        await asyncio.to_thread(_compare)
        await load_state(state)

    def _compare() -> None:
        pairs = list(zip(contents(source), contents(receiver.guest), strict=True))
        assert [number for number, (ours, theirs) in enumerate(pairs) if ours != theirs] == []
        slices.append(len(pairs))

    receiver.guest.load_state = observed  # type: ignore[method-assign]
    return slices


def written_by(workload: QemuWorkload) -> int:
    """Return the private memory of a clone without pages of zeros that it only reads, bytes."""
    assert workload.clone is not None
    base = (workload.clone.device, workload.clone.inode)
    return sum(one.counts["Anonymous"] for one in smaps.smaps(workload.clone.pid) if one.mapping.identity == base)


async def move(source: Clone, receiver: Receiver, **options: Any) -> MigrationResult:
    """Migrate a clone, and check that the memory of both sides is equal. Return the result."""
    slices = compared(source.workload, receiver)
    moving_there = pageferry.migrate_async(source.workload, receiver.address, **options)
    result, _ = await asyncio.gather(moving_there, receiver.received())
    assert len(slices) == 1
    assert result.clone is not None
    return result


def test_clone_moves_to_the_base_of_another_host_and_back(
    clone: Make, image: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        one, moved, back = clone("one"), clone("moved"), clone("back")
        await one.start(image)
        await one.serial.ticks(2)
        async with receiving(there, "moved", moved.command, bases=[image.parent]) as receiver:
            result = await move(one, receiver)
            assert result.clone is not None
            assert (result.clone.shared, result.clone.reason) == (True, None)
            assert result.clone.private < result.memory / 2
            assert result.skipped * PAGE > result.memory / 4
            moved.workload = receiver.guest
        await until_gone(image)
        await moved.serial.passes(2)
        home = Registry().path
        with monkeypatch.context() as patched:
            patched.setenv("PAGEFERRY_RUN_DIR", str(there))
            (base,) = describe_bases()
            assert (base.clones, base.image) == (["moved"], str(image))
            child = image.with_name("child")
            await pageferry.checkpoint_async(moved.workload, child)
            assert ImageFile(child).verify() == []
            child.unlink()
            async with receiving(home, "back", back.command, bases=[image]) as receiver:
                result = await move(moved, receiver, memory="shared", codec="lz4", populate="hot", streams=3)
                assert result.clone is not None
                assert result.clone.shared
        await back.serial.passes(2)
        await receiver.guest.discard()
        await until_gone(image)

    asyncio.run(run())


def test_clone_moves_to_a_guest_of_the_same_base_without_an_option(clone: Make, image: Path) -> None:
    async def run() -> None:
        one, other, moved = clone("one"), clone("other"), clone("moved")
        await one.start(image)
        await other.start(image)
        async with receiving(Registry().path, "moved", moved.command) as receiver:
            result = await move(one, receiver)
            assert result.clone is not None
            assert result.clone.shared
        (base,) = describe_bases()
        assert sorted(base.clones) == ["moved", "other"]
        await other.serial.passes(1)
        await moved.serial.passes(2)
        await receiver.guest.discard()
        await other.workload.discard()
        await until_gone(image)

    asyncio.run(run())


def test_all_pages_are_sent_to_a_host_without_the_image(clone: Make, image: Path, there: Path, tmp_path: Path) -> None:
    async def run() -> None:
        one, moved = clone("one"), clone("moved")
        await one.start(image)
        (tmp_path / "bases").mkdir()
        (tmp_path / "bases" / image.name).write_bytes(b"another file of this name")
        async with receiving(there, "moved", moved.command, bases=[tmp_path / "bases"]) as receiver:
            with pytest.raises(PeerRefused, match="no image on this host has the id"):
                await pageferry.migrate_async(one.workload, receiver.address, memory="shared")
            assert receiver.listens
            with pytest.raises(UnsupportedError, match=r"in hybrid mode.*precopy"):
                await pageferry.migrate_async(one.workload, receiver.address, mode="hybrid")
            await one.serial.ticks(1)
            result = await move(one, receiver)
            assert result.clone is not None
            assert not result.clone.shared
            assert result.clone.reason is not None
            assert "no image on this host has the id" in result.clone.reason
            assert receiver.guest.clone is None
            await moved.serial.passes(2)
            await receiver.guest.discard()
        await until_gone(image)

    asyncio.run(run())


def test_cancelled_migration_leaves_a_clone_that_is_saved_and_migrated_exactly(
    clone: Make, image: Path, there: Path
) -> None:
    async def run() -> None:
        one, moved, child = clone("one"), clone("moved"), image.with_name("child")
        await one.start(image)
        began = asyncio.Event()

        def on_event(event: object) -> None:
            if isinstance(event, SetupEvent):
                began.set()

        async with receiving(there, "moved", moved.command, bases=[image]) as receiver:
            migration = asyncio.ensure_future(
                pageferry.migrate_async(one.workload, receiver.address, bandwidth="1M", listener=on_event)
            )
            await began.wait()
            await one.serial.ticks(2)
            with pytest.raises(WorkloadError, match="a migration by process"):
                await pageferry.checkpoint_async(one.workload, child)
            await save(one.workload, child, mode="stop")
            migration.cancel()
            with pytest.raises(asyncio.CancelledError):
                await migration
            assert "cancelled" in str(await receiver.failed())
        for mode in ("lazy", "stop"):
            await one.serial.passes(1)
            await save(one.workload, child, mode=mode)
        async with receiving(there, "moved", moved.command, bases=[image]) as receiver:
            await move(one, receiver)
            await moved.serial.passes(2)
            await receiver.guest.discard()
        await until_gone(image)
        child.unlink()

    asyncio.run(run())


def test_paused_clone_is_moved_from_the_command_line_with_few_bytes(clone: Make, image: Path, there: Path) -> None:
    async def run() -> None:
        one, moved = clone("one"), clone("moved")
        await one.start(image)
        await one.serial.ticks(5)
        await pageferry.pause_async("one")
        written = written_by(one.workload)
        one.workload.close()
        host = moving.Host(run_directory=there, address="127.0.0.1")
        lines: list[dict[str, Any]] = []
        for name, at_source, at_destination, expected in (
            ("killed", "source.last-pages-sent=kill", None, -signal.SIGKILL),
            ("lost", None, "destination.in-round=kill", 23),
            ("moved", None, None, 0),
        ):
            options = ["--base", str(image.parent), "--memory", "shared", "--detach", "--output", "json"]
            words = ["-m", "pageferry", "receive", name, *host.listening, *options, "--", *clone(name).command]
            with host.program(*words, fault=at_destination) as receiver:
                address = moving.address_of(receiver)
                with moving.migrating("one", address, "--memory", "shared", fault=at_source) as migration:
                    lines = moving.all_until(migration, "migration") if expected == 0 else []
                    assert migration.wait() == expected
                if expected == 0:
                    assert receiver.wait() == 0
        assert (lines[-1]["clone"]["shared"], lines[-1]["paused"]) == (True, True)
        assert lines[-1]["transferred"] <= 1.2 * written
        assert "one" not in Registry().entries()
        await _continue(there, moved)

    async def _continue(run_directory: Path, moved: Clone) -> None:
        environment = moving.environment(None, moving.Host(run_directory=run_directory))
        guest = await QemuWorkload.attach("moved", registry=Registry(run_directory))
        assert guest.clone is not None
        assert not await guest.running()
        guest.close()
        for command in ("resume", "stop"):
            words = [sys.executable, "-m", "pageferry", command, "moved"]
            await asyncio.to_thread(subprocess.run, words, env=environment, check=True, capture_output=True)
            if command == "resume":
                await moved.serial.passes(2)

    asyncio.run(run())
