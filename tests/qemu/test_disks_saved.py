"""Tests of checkpoints with disks, and of restores over the saved disks."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pageferry
from pageferry.checkpoints.events import CheckpointResult, RestoreResult
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.errors import CheckpointError, DisksDiffer, ImageError, UsageError, WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Registry
from pageferry.workloads.events import DisksProgress
from pageferry.workloads.inventory import describe
from pageferry.workloads.qemu import frozen_files
from pageferry.workloads.qemu.disk_copying import DiskCopying
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import travel
from tests.guest.disk_writer import DiskWriter
from tests.guest.disks import raw
from tests.guest.machines import GuestParts
from tests.guest.serial import GuestFailed
from tests.kernel.programs import DEADLINE

pytestmark = pytest.mark.usefixtures("root", "registry")


class Saved:
    """Guest that writes to two disks, and its image."""

    def __init__(self, parts: GuestParts, folder: Path) -> None:
        self.parts = parts
        self.folder = folder
        self.image = folder / "image"
        self.writer = DiskWriter(folder)
        self.copies = folder / "copies"
        self.copies.mkdir()

    def mode(self, word: str) -> str:
        """Return the value of the option `disks` for a mode."""
        return f"copy:{self.copies}" if word == "copy" else word

    def command(self, name: str) -> list[str]:
        """Return the command line of QEMU for the guest `name`."""
        return self.parts.bare(*self.writer.options(name))

    async def start(self, name: str = "saved") -> QemuWorkload:
        """Start the guest, and wait until it has written to its disks."""
        workload = await QemuWorkload.start(name, self.command(name))
        await self.writer.writes(name)
        return workload

    async def save(self, workload: QemuWorkload, word: str, **how: Any) -> CheckpointResult:
        """Save the guest with its disks."""
        return await pageferry.checkpoint_async(workload, self.image, disks=self.mode(word), **how)

    async def restore(self, name: str, **how: Any) -> tuple[QemuWorkload, RestoreResult]:
        """Restore the guest with the command line of the saved guest."""
        return await restore_guest(name, self.image, self.command(name), **how)


def contents_of(result: CheckpointResult) -> dict[str, bytes]:
    """Return the contents of the files that contain the disks of a checkpoint."""
    return {disk.path: Path(disk.path).read_bytes() for disk in result.disks}


@pytest.mark.every_qemu
@pytest.mark.parametrize("word", ["snapshot", "copy"])
def test_guests_are_restored_side_by_side_over_the_saved_disks(parts: GuestParts, tmp_path: Path, word: str) -> None:
    async def run() -> None:
        saved = Saved(parts, tmp_path)
        source = await saved.start()
        result = await saved.save(source, word)
        assert source._disk_saving is None  # a later migration saves the state as if there had been no checkpoint
        await saved.writer.writes("saved", 4)  # the disks of the source differ from the saved ones now
        contents = contents_of(result)
        assert [disk.name for disk in result.disks] == ["a", "b"]
        one, first = await saved.restore("one")
        other, second = await saved.restore("other", disks=f"overlay:{saved.copies}")
        for name in ("one", "other", "saved"):
            await saved.writer.writes(name, 3)
        assert {path.parent for path in map(Path, second.overlays.values())} == {saved.copies}
        assert set(first.overlays) == {disk.id for disk in result.disks}
        assert contents_of(result) == contents
        for workload in (one, other, source):
            await workload.discard()
        for name in ("one", "other", "saved"):
            saved.writer.check(name)

    asyncio.run(run())


def test_guest_notices_a_disk_that_was_not_saved(newest_parts: GuestParts, tmp_path: Path) -> None:
    """Control experiment: the guest prints an error if its memory and its disks are of different moments."""

    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await saved.save(source, "record")
        await saved.writer.writes("saved", 4)
        await source.discard()
        restored, _ = await saved.restore("restored", disks="as-is")
        with pytest.raises(GuestFailed, match="wrong sectors"):
            await saved.writer.writes("restored", 3)
        await restored.discard()

    asyncio.run(run())


@pytest.mark.parametrize("word", ["snapshot", "copy"])
@pytest.mark.parametrize("how", ["stop", "paused"])
def test_disks_are_saved_in_other_modes(newest_parts: GuestParts, tmp_path: Path, word: str, how: str) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        if how == "paused":
            await pageferry.pause_async("saved")
        await saved.save(source, word, mode="lazy" if how == "paused" else "stop")
        if how == "paused":
            await pageferry.resume_async("saved")
        await saved.writer.writes("saved", 3)
        restored, result = await saved.restore("restored", resume=True)
        assert result.was_paused == (how == "paused")
        await saved.writer.writes("restored", 3)
        await restored.discard()
        await source.discard()

    asyncio.run(run())


def test_saved_disks_are_read_only(newest_parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await saved.save(source, "snapshot")
        for disk in (saved.writer.a, saved.writer.b):
            assert os.stat(disk).st_mode & 0o222 == 0
        await source.discard()

    asyncio.run(run())


# -- frozen files


def test_guest_that_would_write_to_a_frozen_disk_is_refused(newest_parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        result = await saved.save(source, "snapshot")
        await source.discard()
        overlays = [disk.overlay for disk in result.disks]
        with pytest.raises(UsageError, match=r"would write to .*a\.qcow2, which is frozen") as refusal:
            await QemuWorkload.start("again", saved.command("again"))
        assert str(saved.image) in str(refusal.value)
        assert str(overlays[0]) in str(refusal.value)
        with pytest.raises(UsageError, match="is frozen"):
            await saved.restore("again", disks="as-is")
        assert list(Registry().entries()) == []
        # The guest continues on its overlays.
        words = [
            one.replace(f"{saved.writer.b},format=raw", f"{overlays[1]},format=qcow2") for one in saved.command("on")
        ]
        words = [one.replace(str(saved.writer.a), str(overlays[0])) for one in words]
        again = await QemuWorkload.start("on", words)
        await saved.writer.writes("on")
        await again.discard()
        saved.image.unlink()
        remove(*overlays)
        again = await QemuWorkload.start("again", saved.command("again"))
        await again.discard()
        assert not frozen_files.record_path(saved.writer.a).exists()
        assert os.stat(saved.writer.a).st_mode & 0o200

    asyncio.run(run())


@pytest.mark.every_qemu
def test_commit_makes_the_guest_use_its_own_disks_again(parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(parts, tmp_path)
        source = await saved.start()
        result = await saved.save(source, "snapshot")
        assert [one.name for one in (await describe(source)).overlays] == ["a", "b"]
        with pytest.raises(WorkloadError, match=rf"image {saved.image} needs {saved.writer.a}"):
            await pageferry.commit_disks_async("saved")
        restored, _ = await saved.restore("restored")
        with pytest.raises(WorkloadError, match=r"overlay .*-restored-.* needs"):
            await pageferry.commit_disks_async("saved", force=True)
        await restored.discard()
        remove(*matching(tmp_path, "*-restored-*.qcow2"))
        await saved.writer.writes("saved")
        committed = await pageferry.commit_disks_async("saved", force=True)
        assert [(disk.name, disk.removed) for disk in committed.disks] == [
            (disk.name, [disk.overlay]) for disk in result.disks
        ]
        await saved.writer.writes("saved", 3)
        assert used_by("saved") == {str(saved.writer.a), str(saved.writer.b)}
        assert files_of(tmp_path) == {"a.qcow2", "b.raw", "floppy", "image", "saved.serial", "restored.serial"}
        with pytest.raises(DisksDiffer):
            await saved.restore("restored", disks="checked")
        await source.discard()

    asyncio.run(run())


def test_second_checkpoint_freezes_the_overlays_of_the_first(newest_parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await saved.save(source, "snapshot")
        await saved.writer.writes("saved")
        first, saved.image = saved.image, tmp_path / "second"
        await saved.save(source, "snapshot")
        await saved.writer.writes("saved")
        for name, image in (("one", first), ("two", saved.image)):
            saved.image = image
            restored, _ = await saved.restore(name)
            await saved.writer.writes(name, 2)
            await restored.discard()
        remove(*matching(tmp_path, "*-one-*.qcow2", "*-two-*.qcow2"))
        for image in (first, tmp_path / "second"):
            pageferry.delete_image(image)
        await pageferry.commit_disks_async("saved")
        await saved.writer.writes("saved", 2)
        assert used_by("saved") == {str(saved.writer.a), str(saved.writer.b)}
        assert matching(tmp_path, "*-*.qcow2", "*.frozen") == []
        await source.discard()

    asyncio.run(run())


def test_disks_with_relative_paths_are_written_back_from_another_directory(
    newest_parts: GuestParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        words = [one.replace(f"{saved.writer.b}", "b.raw") for one in saved.command("saved")]
        assert words != saved.command("saved")
        monkeypatch.chdir(tmp_path)
        source = await QemuWorkload.start("saved", words)
        monkeypatch.chdir(saved.copies)
        await saved.writer.writes("saved")
        await saved.save(source, "snapshot")
        saved.image.unlink()
        assert [one.name for one in (await describe(source)).overlays] == ["a", "b"]
        committed = await pageferry.commit_disks_async("saved")
        assert [(disk.name, disk.path) for disk in committed.disks] == [
            ("a", str(saved.writer.a)),
            ("b", str(saved.writer.b)),
        ]
        monkeypatch.chdir(tmp_path)
        assert files_of(tmp_path) == {"a.qcow2", "b.raw", "floppy", "saved.serial"}
        await source.discard()

    asyncio.run(run())


def test_image_is_deleted_with_the_copies_that_only_it_needs(newest_parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        result = await saved.save(source, "copy")
        await source.discard()
        restored, found = await saved.restore("restored")
        await restored.discard()
        overlay = Path(found.overlays[result.disks[0].id])
        remove(found.overlays[result.disks[1].id])
        deleted = pageferry.delete_image(saved.image)
        assert deleted.removed == [result.disks[1].path]
        assert [(one.path, one.needed_by) for one in deleted.kept] == [(result.disks[0].path, [f"overlay {overlay}"])]
        assert files_of(saved.copies) == {
            Path(result.disks[0].path).name,
            f"{Path(result.disks[0].path).name}.frozen",
            overlay.name,
        }
        assert not saved.image.exists()

    asyncio.run(run())


def test_parent_of_an_image_is_not_deleted(newest_parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await saved.save(source, "record")
        parent, saved.image = saved.image, tmp_path / "child"
        await saved.save(source, "record", parent=parent)
        await source.discard()
        with pytest.raises(ImageError, match=f"{saved.image} needs it as a parent"):
            pageferry.delete_image(parent)
        pageferry.delete_image(saved.image)
        pageferry.delete_image(parent)

    asyncio.run(run())


# -- failures


@pytest.mark.parametrize("word", ["snapshot", "copy"])
def test_missing_directory_is_refused_before_the_pause(newest_parts: GuestParts, tmp_path: Path, word: str) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        with pytest.raises(WorkloadError, match="No such file or directory; create the directory"):
            await pageferry.checkpoint_async(source, saved.image, disks=f"{word}:{tmp_path}/missing")
        await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.parametrize("word", ["snapshot", "copy"])
def test_full_file_system_is_refused_before_the_pause(newest_parts: GuestParts, tmp_path: Path, word: str) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        with small_file_system(tmp_path / "small", "128k") as folder:
            with pytest.raises(WorkloadError, match="No space left on device"):
                await pageferry.checkpoint_async(source, saved.image, disks=f"{word}:{folder}")
            assert files_of(folder) == set()
            await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.every_qemu
def test_guest_runs_on_after_a_copy_without_space(
    parts: GuestParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system becomes full just before the snapshot point. The next write of the guest cannot be copied."""
    freeze = DiskCopying.freeze

    async def run() -> None:
        saved = Saved(parts, tmp_path)
        source = await saved.start()
        with small_file_system(tmp_path / "small", "3M") as folder:

            async def fill(saving: DiskCopying) -> None:
                with suppress(OSError), (folder / "full").open("wb") as file:
                    file.write(bytes(3 << 20))
                await freeze(saving)

            monkeypatch.setattr(DiskCopying, "freeze", fill)
            with pytest.raises(WorkloadError, match=r"cannot copy disk . of saved to .*: No space left on device"):
                await pageferry.checkpoint_async(source, saved.image, disks=f"copy:{folder}")
            assert files_of(folder) == {"full"}
            await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.every_qemu
def test_copy_that_would_fill_its_file_system_is_refused(newest_parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await travel.ask("saved", "human-monitor-command", command_line='qemu-io b "write -P 7 4M 4M"')
        with small_file_system(tmp_path / "small", "3M") as folder:
            with pytest.raises(WorkloadError, match=r"cannot copy disk b of saved to .*: No space left on device"):
                await pageferry.checkpoint_async(source, saved.image, disks=f"copy:{folder}")
            assert files_of(folder) == set()
            await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.parametrize("word", ["snapshot", "copy"])
def test_existing_file_is_not_replaced(
    newest_parts: GuestParts, tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        fixed = SimpleNamespace(urandom=lambda count: b"\x11" * count)
        monkeypatch.setattr("pageferry.checkpoints.request.os", fixed)
        existing = saved.copies / "b-11111111.qcow2"
        existing.write_text("mine")
        with pytest.raises(WorkloadError, match=rf"cannot create {existing}, .*: the file exists"):
            await pageferry.checkpoint_async(source, saved.image, disks=f"{word}:{saved.copies}")
        assert existing.read_text() == "mine"
        existing.unlink()
        await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.parametrize("word", ["snapshot", "copy"])
def test_failure_after_the_snapshot_point_leaves_the_guest_on_its_own_disks(
    newest_parts: GuestParts, tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image cannot be completed after the disks have been frozen or after their copies have started."""

    async def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        monkeypatch.setattr("pageferry.checkpoints.attempt.Attempt._complete", fails)
        with pytest.raises(CheckpointError, match="No space left on device"):
            await saved.save(source, word)
        await unharmed(saved, source)

    asyncio.run(run())


def test_refusal_of_qemu_leaves_the_guest_on_its_own_disks(newest_parts: GuestParts, tmp_path: Path) -> None:
    """Another block job uses a disk, so that QEMU refuses the transaction."""

    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        target = str(tmp_path / "target")
        await travel.ask(
            "saved", "drive-backup", device="b", target=target, sync="full", format="raw", speed=1, job_id="j"
        )
        with pytest.raises(WorkloadError, match="cannot execute QMP transaction"):
            await saved.save(source, "snapshot")
        await travel.ask("saved", "block-job-cancel", device="j", force=True)
        remove(target)
        await unharmed(saved, source)

    asyncio.run(run())


def test_disks_in_the_page_cache_are_frozen_and_stay_open_while_the_device_state_is_saved(
    newest_parts: GuestParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's migration of the device state would release the disks, and `cont` would then drop their page cache."""
    commands: list[str] = []
    execute = Monitor._execute

    async def record(monitor: Monitor, command: str, arguments: dict[str, Any] | None) -> Any:
        commands.append(command)
        return await execute(monitor, command, arguments)

    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        monkeypatch.setattr(Monitor, "_execute", record)
        await saved.save(source, "snapshot")
        await source.discard()

    asyncio.run(run())
    order = [one for one in commands if one in ("migrate", "stop", "transaction", "snapshot-save", "cont")]
    assert order == ["stop", "transaction", "snapshot-save", "cont"]


# -- killed commands


@pytest.mark.parametrize("word", ["snapshot", "copy"])
@pytest.mark.parametrize("point", ["disks.prepared", "disks.frozen", "checkpoint.saved", "disks.sealed"])
def test_guest_survives_a_killed_command(newest_parts: GuestParts, tmp_path: Path, word: str, point: str) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        command = ["checkpoint", "saved", str(saved.image), "--disks", saved.mode(word)]
        assert await pageferry_command(*command, fault=f"{point}=kill") == -9
        await saved.writer.writes("saved", 2)
        assert not saved.image.exists()
        if word == "copy":
            await until(lambda: not any(name.startswith("pageferry-") for name in node_names("saved")))
            if point in ("disks.prepared", "disks.frozen"):  # the copies are not complete yet
                await until(lambda: files_of(saved.copies) == set())
        else:
            result = await pageferry.commit_disks_async("saved")
            assert bool(result.removed) == (point == "disks.prepared")
            assert used_by("saved") == {str(saved.writer.a), str(saved.writer.b)}
            await unharmed(saved, source)
            return
        await source.discard()

    asyncio.run(run())


KILLED_IN_SAVE = """
import asyncio, os, signal, sys
import pageferry
from pageferry.workloads.qemu import snapshot
from pageferry.workloads.qemu.guest import QemuWorkload

async def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    snapshot._try = die  # called first when the snapshot is complete
    await pageferry.checkpoint_async(await QemuWorkload.attach(sys.argv[1]), sys.argv[2], disks=sys.argv[3])

asyncio.run(main())
"""


def test_guardian_removes_the_snapshot_of_a_killed_copy(newest_parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        words = ["-c", KILLED_IN_SAVE, "saved", str(saved.image), saved.mode("copy")]
        process = await asyncio.create_subprocess_exec(sys.executable, *words)
        async with asyncio.timeout(3 * DEADLINE):
            assert await process.wait() == -signal.SIGKILL
        await until(lambda: in_loop(travel.ask("saved", "query-status"))["running"] and not files_of(saved.copies))
        await until(lambda: not in_loop(travel.ask("saved", "query-jobs")))
        await unharmed(saved, source)

    asyncio.run(run())


def test_pause_of_a_copy_contains_no_change_of_block_nodes(
    newest_parts: GuestParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file for the device state is opened before the pause, and closed after the pause."""
    commands: list[str] = []
    execute = Monitor._execute

    async def note(monitor: Monitor, command: str, arguments: dict[str, Any] | None) -> Any:
        commands.append(command)
        return await execute(monitor, command, arguments)

    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        with monkeypatch.context() as patch:
            patch.setattr(Monitor, "_execute", note)
            await saved.save(source, "copy")
        paused = commands[commands.index("stop") : commands.index("cont")]
        assert {"transaction", "snapshot-save"} <= set(paused)
        assert not {"add-fd", "blockdev-add", "blockdev-del", "remove-fd"} & set(paused)
        remove(saved.image, *saved.copies.iterdir())
        await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.parametrize("point", ["disks.commit", "disks.committed"])
def test_killed_commit_is_continued(newest_parts: GuestParts, tmp_path: Path, point: str) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await saved.save(source, "snapshot")
        saved.image.unlink()
        assert await pageferry_command("disks", "commit", "saved", fault=f"{point}=kill") == -9
        await saved.writer.writes("saved", 2)
        await pageferry.commit_disks_async("saved")
        assert used_by("saved") == {str(saved.writer.a), str(saved.writer.b)}
        await unharmed(saved, source)

    asyncio.run(run())


def test_cancelled_checkpoint_removes_copies(newest_parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()

        def cancel(event: object) -> None:
            if isinstance(event, DisksProgress):
                task.cancel()

        task = asyncio.ensure_future(saved.save(source, "copy", listener=cancel))
        with pytest.raises(asyncio.CancelledError):
            await task
        await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.parametrize("word", ["snapshot", "copy"])
def test_checkpoint_interrupted_in_the_transaction_leaves_the_guest_on_its_own_disks(
    newest_parts: GuestParts, tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU executes the transaction, but the command does not receive the reply."""

    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        interrupt_after(monkeypatch, "transaction", asyncio.CancelledError())
        with pytest.raises(asyncio.CancelledError):
            await saved.save(source, word)
        await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.parametrize("error", [asyncio.CancelledError(), WorkloadError("refused")])
def test_commit_that_fails_after_a_disk_was_completed_is_retried(
    newest_parts: GuestParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await saved.save(source, "snapshot")
        saved.image.unlink()
        with monkeypatch.context() as patch:
            interrupt_after(patch, "job-complete", error, pause=1.0)
            with pytest.raises(type(error)):
                await pageferry.commit_disks_async("saved")
        await saved.writer.writes("saved", 2)
        assert in_loop(travel.ask("saved", "query-jobs")) == []
        files = {"a": saved.writer.a, "b": saved.writer.b}
        (completed,) = [name for name, file in files.items() if str(file) in used_by("saved")]
        assert {name for name, file in files.items() if os.stat(file).st_mode & 0o200} == {completed}
        assert matching(tmp_path, f"{completed}-*.qcow2") == []
        committed = await pageferry.commit_disks_async("saved")
        assert {disk.name for disk in committed.disks} == {*files} - {completed}
        await unharmed(saved, source)

    asyncio.run(run())


def test_cancelled_commit_that_completes_its_disks_is_finished(
    newest_parts: GuestParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = Monitor._execute

    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await saved.save(source, "snapshot")
        saved.image.unlink()

        async def cancel(monitor: Monitor, command: str, arguments: dict[str, Any] | None) -> Any:
            result = await execute(monitor, command, arguments)
            if command == "job-complete":
                task.cancel()
            return result

        monkeypatch.setattr(Monitor, "_execute", cancel)
        task = asyncio.ensure_future(pageferry.commit_disks_async("saved"))
        with pytest.raises(asyncio.CancelledError):
            await task
        await unharmed(saved, source)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_copies_share_the_blocks_of_their_disks(newest_parts: GuestParts, tmp_path: Path, kind: str) -> None:
    async def run(folder: Path) -> None:
        saved = Saved(newest_parts, folder)
        source = await saved.start()
        result = await saved.save(source, "copy")
        await saved.writer.writes("saved", 4)
        assert sorted(Path(disk.path).suffix for disk in result.disks) == [".qcow2", ".raw"]  # the formats of the disks
        for disk in result.disks:
            assert shared_extents(disk.path)
        restored, _ = await saved.restore("restored")
        await saved.writer.writes("restored", 3)
        await restored.discard()
        await source.discard()

    with file_system(tmp_path, kind) as folder:
        asyncio.run(run(folder))


def test_copies_and_memory_share_the_bandwidth_limit(newest_parts: GuestParts, tmp_path: Path) -> None:
    """The copies have a total size of 16 MiB. QEMU copies up to 1 MiB per disk before it applies a limit."""
    limit, seen = 4 << 20, list[tuple[float, int]]()

    def note(event: object) -> None:
        if isinstance(event, DisksProgress):
            seen.append((time.monotonic(), event.done))

    async def run() -> None:
        saved = Saved(newest_parts, tmp_path)
        source = await saved.start()
        await saved.save(source, "copy", bandwidth=limit, listener=note)
        await saved.writer.writes("saved", 2)
        restored, _ = await saved.restore("restored")
        await saved.writer.writes("restored", 3)
        await restored.discard()
        await source.discard()

    asyncio.run(run())
    (began, first), *_, (ended, last) = seen
    assert last == 16 << 20
    assert first <= 4 << 20  # while the memory was saved, the copies waited
    assert (last - first) / (ended - began) <= 1.25 * limit


def test_commands_report_saved_disks(newest_parts: GuestParts, tmp_path: Path) -> None:
    def said(*words: str, code: int = 0) -> str:
        environment = {**os.environ, "COLUMNS": "400"}
        command = [sys.executable, "-m", "pageferry", *words]
        done = subprocess.run(command, timeout=DEADLINE, capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stderr
        return " ".join((done.stdout if not code else done.stderr).split())

    saved = Saved(newest_parts, tmp_path)
    image, b = str(saved.image), saved.writer.b
    said("run", "saved", "--detach", "--", *saved.command("saved"))
    shown = said("checkpoint", "saved", image, "--disks", "snapshot")
    assert f"b: {b} is frozen; the guest writes to {tmp_path}/b-" in shown
    assert f"saved: disk b: writes to {tmp_path}/b-" in said("list")
    assert f"{b} (raw), 8 MiB, frozen, needed by overlay {tmp_path}/b-" in said("image", "info", image)
    assert "which is frozen" in said("run", "other", "--detach", "--", *saved.command("other"), code=2)
    assert f"image {image} needs {saved.writer.a}" in said("disks", "commit", "saved", code=10)
    said("restore", "restored", image, "--detach", "--", *saved.command("restored"))
    said("stop", "restored")
    remove(*matching(tmp_path, "*-restored-*"))
    assert f"kept {b}: needed by overlay" in said("image", "delete", image)
    assert f"saved: disk b uses {b} again; removed {tmp_path}/b-" in said("disks", "commit", "saved")
    said("stop", "saved")


# -- checks of the tests above


def interrupt_after(patch: pytest.MonkeyPatch, interrupted: str, error: BaseException, *, pause: float = 0.0) -> None:
    """Raise an error instead of returning the reply to a command, `pause` seconds after QEMU has executed the
    command."""
    execute = Monitor._execute

    async def run(monitor: Monitor, command: str, arguments: dict[str, Any] | None) -> Any:
        result = await execute(monitor, command, arguments)
        if command == interrupted:
            await asyncio.sleep(pause)
            raise error
        return result

    patch.setattr(Monitor, "_execute", run)


def used_by(name: str) -> set[str]:
    """Return the files to which the disks of a guest are written."""
    found = in_loop(travel.ask(name, "query-block"))
    return {one["inserted"]["file"] for one in found if "inserted" in one and not one["inserted"]["ro"]}


def node_names(name: str) -> list[str]:
    """Return the names of the block nodes of a guest."""
    return [one["node-name"] for one in in_loop(travel.ask(name, "query-named-block-nodes", flat=True))]


def in_loop(call: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a new event loop in another thread."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, call).result()


def matching(folder: Path, *patterns: str) -> list[Path]:
    """Return the files in a folder that match one of the patterns."""
    return [path for pattern in patterns for path in folder.glob(pattern)]


def remove(*paths: str | Path | None) -> None:
    """Remove files."""
    for path in paths:
        os.unlink(str(path))


def files_of(folder: Path) -> set[str]:
    """Return the names of the files in a folder, without the sources of the boot sector and working sets."""
    left_out = re.compile(r"boot\..*|.*\.ws")
    return {path.name for path in folder.iterdir() if path.is_file() and not left_out.fullmatch(path.name)}


async def unharmed(saved: Saved, source: QemuWorkload) -> None:
    """Check that the guest runs on its own disks, and that nothing else is left. Then end the guest."""
    await saved.writer.writes("saved", 2)
    assert used_by("saved") == {str(saved.writer.a), str(saved.writer.b)}
    assert not any(name.startswith("pageferry-") for name in node_names("saved"))
    assert in_loop(travel.ask("saved", "query-jobs")) == []
    assert files_of(saved.folder) - {"saved.serial"} == {"a.qcow2", "b.raw", "floppy"}
    assert files_of(saved.copies) == set()
    assert os.stat(saved.writer.b).st_mode & 0o200
    await source.discard()


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of this size, for the block."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


@contextmanager
def file_system(folder: Path, kind: str) -> Iterator[Path]:
    """Mount a new file system in a file, for the block. Skip the test if the host cannot mount it."""
    disk, mounted = raw(folder / "file-system", 512 << 20), folder / "mounted"
    mounted.mkdir()
    made = (
        subprocess.run([f"mkfs.{kind}", "-q", disk], capture_output=True, text=True)
        if shutil.which(f"mkfs.{kind}")
        else None
    )
    if made is None:
        pytest.skip(f"mkfs.{kind} is missing (`make system` installs it, on Debian)")
    assert made.returncode == 0, made.stderr
    done = subprocess.run(["mount", "-t", kind, "-o", "loop", disk, mounted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount {kind}: {done.stderr.strip()}")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "--lazy", mounted], check=True)


def shared_extents(path: str) -> bool:
    """Return whether the file shares blocks with another one (FIEMAP_EXTENT_SHARED of the kernel's fiemap)."""
    header = struct.Struct("=QQIIII")
    extent = struct.Struct("=QQQQQIIII")
    request = bytearray(header.pack(0, 1 << 62, 1, 0, 64, 0).ljust(header.size + 64 * extent.size, b"\0"))
    with open(path, "rb") as file:
        fcntl.ioctl(file, 0xC020660B, request)
    found = header.unpack_from(request)[3]
    flags = [extent.unpack_from(request, header.size + number * extent.size)[5] for number in range(found)]
    return any(flag & 0x2000 for flag in flags)


async def pageferry_command(*words: str, fault: str) -> int | None:
    """Run a command with an injected fault. Return its exit code."""
    environment = {**os.environ, "PAGEFERRY_FAULT": fault}
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "pageferry", *words, env=environment)
    async with asyncio.timeout(3 * DEADLINE):  # each record and each copy is synced to a disk that may be busy
        return await process.wait()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for at most 60 seconds."""
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
