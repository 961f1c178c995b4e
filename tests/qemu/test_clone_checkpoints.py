"""Checkpoints of clones (S4): they contain the private pages, and their parent is the image of the base."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.clone_tracking import CloneTracking
from pageferry.checkpoints.events import ArmedEvent
from pageferry.checkpoints.options import Mode
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.checkpoints.rounds import Rounds
from pageferry.errors import CheckpointError, ImageError, UsageError, WorkloadError
from pageferry.host import fault_points
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.pager.launcher import take_over
from pageferry.workloads.clone_view import PrivateMemory
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.clones import Clone, kill_pager, save, status_of, until_gone
from tests.guest.disks import drive, raw
from tests.guest.machines import GuestParts
from tests.guest.restored import Restored, image_of_a_guest
from tests.guest.serial import Serial

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


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_checkpoint_of_a_clone_can_be_restored_with_own_and_shared_memory(
    clone: Make, image: Path, parts: GuestParts, serial: MakeSerial, mode: str
) -> None:
    async def run() -> None:
        first, second = clone("first"), clone("second")
        await first.start(image)
        await second.start(image)
        child = image.with_name(f"child-{mode}")
        private = first.private
        result = await save(first.workload, child, mode=mode)
        assert (await status_of(image)).deferred > 0
        assert (result.tracking, result.tracked, result.parent) == ("private", False, str(image))
        assert result.pages.data * PAGE <= first.private
        assert result.pages.in_parent * PAGE > private
        assert await first.workload.running()
        own, shared = Restored("own", parts, serial("own")), clone("shared")
        await own.start(child)
        await own.serial.passes(2)
        await own.end()
        await shared.start(child)
        await shared.serial.passes(2)
        grandchild = image.with_name(f"grandchild-{mode}")
        assert (await save(shared.workload, grandchild, mode=mode)).parent == str(child)
        for one in (first, second, shared):
            await one.serial.passes(1)
            await one.workload.discard()
        await until_gone(image)
        await until_gone(child)
        assert ImageFile(grandchild).verify() == []
        for link in ImageFile(grandchild).links[:-1]:
            link.path.unlink()

    asyncio.run(run())


def test_checkpoints_of_one_clone_in_sequence_are_exact(clone: Make, image: Path) -> None:
    async def run() -> None:
        one, child = clone("one"), image.with_name("repeated")
        await one.start(image)
        for mode in ("lazy", "stop", "lazy"):
            await save(one.workload, child, mode=mode, at_snapshot_point=4 << 20)
            await one.serial.ticks(2)
        command = [sys.executable, "-m", "pageferry", "checkpoint", "one", str(child)]
        killed = {**os.environ, fault_points.VARIABLE: "checkpoint.armed=kill"}
        for mode in ("lazy", "stop"):  # before the pause, and in the pause
            words = [*command, "--mode", mode]
            done = await asyncio.to_thread(subprocess.run, words, env=killed, capture_output=True, check=False)
            assert done.returncode < 0
            await one.serial.passes(1)
        attached = await QemuWorkload.attach("one")
        await save(attached, child)
        attached.close()
        await one.serial.passes(2)
        await one.workload.discard()
        await until_gone(image)
        child.unlink()

    asyncio.run(run())


def test_two_checkpoints_of_one_clone_at_the_same_time_are_refused(clone: Make, image: Path) -> None:
    async def run() -> None:
        one, child = clone("one"), image.with_name("second")
        await one.start(image)
        assert one.workload.clone is not None
        first = CloneTracking(PrivateMemory("one", one.workload.clone), "lazy")
        assert first.traces() is not None
        with pytest.raises(WorkloadError, match="cannot use one: a checkpoint by process"):
            await pageferry.checkpoint_async(one.workload, child)
        assert not first.finish(None)
        await save(one.workload, child)
        await one.serial.passes(2)
        await one.workload.discard()
        await until_gone(image)
        child.unlink()

    asyncio.run(run())


def test_rounds_that_do_not_converge_are_replaced_by_a_pause(
    clone: Make, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: object) -> None:
        raise LookupError("cannot use the write trace: rounds do not converge")

    async def run() -> None:
        one, child = clone("one"), image.with_name("busy")
        await one.start(image)
        monkeypatch.setattr(Rounds, "_converge", too_many)
        result = await save(one.workload, child)
        assert (result.mode, result.tracking) == ("stop", "private")
        assert "converge" in result.tracking_note
        await one.serial.passes(1)
        await one.workload.discard()
        await until_gone(image)
        child.unlink()

    asyncio.run(run())


def test_pager_killed_during_a_checkpoint_is_replaced_and_the_image_is_exact(clone: Make, image: Path) -> None:
    async def run() -> None:
        one, other, child = clone("one"), clone("other"), image.with_name("unattended")
        await one.start(image)
        await other.start(image)
        replaced: list[asyncio.Task[None]] = []

        async def replace_pager() -> None:
            await kill_pager(image)
            await asyncio.sleep(1)
            await take_over(other.folder)

        def on_event(event: object) -> None:
            if isinstance(event, ArmedEvent):
                replaced.append(asyncio.ensure_future(replace_pager()))

        await save(one.workload, child, listener=on_event)
        await replaced[0]
        for each in (one, other):
            await each.serial.passes(2)
            await each.workload.discard()
        await until_gone(image)
        child.unlink()

    asyncio.run(run())


@pytest.fixture
def small(tmp_path: Path, root: None) -> Iterator[Path]:
    """Mount a file system that is too small for an image. Yield its directory."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256K", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_full_disk_leaves_the_clone_running(clone: Make, image: Path, small: Path, mode: Mode) -> None:
    async def run() -> None:
        one = clone("one")
        await one.start(image)
        (small / "image").symlink_to(image)
        with pytest.raises(CheckpointError, match="free some space"):
            await pageferry.checkpoint_async(one.workload, small / "child", mode=mode)
        assert os.listdir(small) == ["image"]
        await one.serial.passes(2)
        await one.workload.discard()
        await until_gone(image)

    asyncio.run(run())


def test_parent_that_is_missing_or_replaced_is_refused(clone: Make, image: Path, tmp_path: Path) -> None:
    async def run() -> None:
        one, source, child = clone("one"), tmp_path / "image", tmp_path / "child"
        shutil.copyfile(image, source)
        await one.start(source, prefetch=True)
        await one.serial.passes(1)
        await pageferry.checkpoint_async(one.workload, child)
        moved = tmp_path / "moved"
        source.rename(moved)
        with pytest.raises(ImageError, match=r"parent image is not in the same directory"):
            await restore_guest("never", child, one.command)
        with pytest.raises(ImageError, match=r"whose memory one shares: cannot open .*image:.*name it with `parent`"):
            await pageferry.checkpoint_async(one.workload, tmp_path / "second")
        result = await pageferry.checkpoint_async(one.workload, tmp_path / "second", parent=moved)
        assert result.parent == str(moved)
        shutil.copyfile(tmp_path / "second", source)
        with pytest.raises(ImageError, match="replaced"):
            await restore_guest("never", child, one.command)
        with pytest.raises(ImageError, match="replaced since one was started"):
            await pageferry.checkpoint_async(one.workload, tmp_path / "third")
        with pytest.raises(UsageError, match="parent of its checkpoints"):
            await pageferry.checkpoint_async(one.workload, tmp_path / "third", parent=source)
        with pytest.raises(UsageError, match="needs no trace"):
            await pageferry.checkpoint_async(one.workload, tmp_path / "third", parent=moved, track=True)
        with pytest.raises(UsageError, match="same directory"):
            await pageferry.checkpoint_async(one.workload, image.with_name("third"), parent=moved)
        await one.serial.passes(1)
        await one.workload.discard()

    asyncio.run(run())


def test_peek_reads_private_pages_and_pages_of_the_base(clone: Make, image: Path) -> None:
    async def run() -> None:
        one, child = clone("one"), image.with_name("peeked")
        await one.start(image)
        await one.serial.ticks(2)
        await pageferry.pause_async("one")
        await pageferry.checkpoint_async(one.workload, child)
        saved = ImageFile(child)
        step = 20 << 20
        for offset in range(0, saved.pages * PAGE - step, step):
            begin = offset + 123
            words = [sys.executable, "-m", "pageferry", "peek", "one", str(begin), str(step), "--raw"]
            done = await asyncio.to_thread(subprocess.run, words, capture_output=True, check=True)
            assert done.stdout == saved.read(offset // PAGE, step // PAGE + 1)[123 : 123 + step]
        assert (await status_of(image)).deferred > 0
        await pageferry.resume_async("one")
        await one.serial.passes(1)
        await one.workload.discard()
        await until_gone(image)
        child.unlink()

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["lazy", "stop"])
def test_clone_of_a_payload_is_saved_while_it_writes(
    payload_parts: GuestParts, serial: MakeSerial, registry: Registry, tmp_path: Path, root: None, mode: str
) -> None:
    source = image_of_a_guest(payload_parts, tmp_path)

    async def run() -> None:
        one, child = Clone("one", payload_parts, serial("one")), tmp_path / "child"
        await one.start(source)
        await one.serial.ticks(1)
        for _ in range(2):
            assert (await save(one.workload, child, mode=mode)).tracking == "private"
        copy = Clone("copy", payload_parts, serial("copy"))
        await copy.start(child)
        for each in (one, copy):
            await each.serial.passes(2)
            await each.workload.discard()
        await until_gone(source)
        await until_gone(child)

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["lazy", "stop"])
@pytest.mark.parametrize("disks", ["snapshot", "copy:{folder}"])
def test_disks_of_a_clone_are_saved_with_its_memory(
    parts: GuestParts, registry: Registry, tmp_path: Path, root: None, mode: str, disks: str
) -> None:
    async def run() -> None:
        command = parts.bare("-m", "64M", *drive(raw(tmp_path / "disk"), "a"))
        source, image, child = await QemuWorkload.start("source", command), tmp_path / "image", tmp_path / "child"
        await pageferry.checkpoint_async(source, image, disks="snapshot")
        await source.discard()
        one, _ = await restore_guest("one", image, command, memory="shared")
        written = await pageferry.qmp_async(
            "one", "human-monitor-command", {"command-line": 'qemu-io a "write -P 7 64k 64k"'}
        )
        assert "error" not in str(written).lower()
        result = await save(one, child, mode=mode, disks=disks.format(folder=tmp_path))
        (disk,) = result.disks
        assert await one.running()
        await one.discard()
        copy, restored = await restore_guest("copy", child, command, memory="shared")
        assert disk.id in restored.overlays
        read = await pageferry.qmp_async(
            "copy", "human-monitor-command", {"command-line": 'qemu-io a "read -P 7 64k 64k"'}
        )
        assert "verification failed" not in str(read).lower()
        await copy.discard()
        await until_gone(image)
        await until_gone(child)

    asyncio.run(run())
