"""Tests that a guest is restored over the unchanged disks of its checkpoint, or not at all."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.errors import DisksDiffer, UnsupportedError
from pageferry.host.registry import Registry
from pageferry.memory.regions import Identity
from pageferry.workloads.protocols import SnapshotDetails
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.disks import drive, qcow2, raw
from tests.guest.machines import GuestParts
from tests.guest.travel import ask
from tests.kernel.programs import DEADLINE

pytestmark = pytest.mark.usefixtures("root", "registry")

AS_IS = {"disks": "as-is"}


def disk_of_kind(folder: Path, kind: str) -> tuple[str, ...]:
    """Create a disk. Return the options that attach it as `a`."""
    match kind:
        case "raw":
            return drive(raw(folder / "disk"), "a")
        case "qcow2":
            return drive(qcow2(folder / "disk"), "a", kind="qcow2")
    overlay = qcow2(folder / "disk", backing=raw(folder / "base"))
    return drive(overlay, "a", kind="qcow2")


async def write(name: str, pattern: int = 7) -> None:
    """Write to the disk `a` of a guest through QEMU's block layer, as the guest does."""
    said = await ask(name, "human-monitor-command", command_line=f'qemu-io a "write -P {pattern} 64k 64k"')
    assert "error" not in str(said).lower()


async def flush(name: str) -> None:
    """Have QEMU write the metadata of the disk `a`."""
    assert "error" not in str(await ask(name, "human-monitor-command", command_line="qemu-io a flush")).lower()


async def saved(parts: GuestParts, image: Path, options: Sequence[str], *, paused: bool = False, **how: Any) -> None:
    """Save a machine that has written to its disk, and then end it."""
    workload = await QemuWorkload.start("saved", parts.bare("-m", "64M", *options))
    try:
        await write("saved")
        if paused:
            await ask("saved", "stop")
        else:
            await flush("saved")
            await asyncio.sleep(0.05)  # several ticks of the clock of modification times
        await pageferry.checkpoint_async(workload, image, **how)
    finally:
        await workload.discard()


async def restores(parts: GuestParts, image: Path, options: Sequence[str], **how: Any) -> None:
    """Restore a machine, and end it."""
    workload, _ = await restore_guest("restored", image, parts.bare("-m", "64M", *options), **how)
    await workload.discard()


async def refused(parts: GuestParts, image: Path, options: Sequence[str], **how: Any) -> str:
    """Check that a restore is refused, writes to no disk, and leaves no workload. Return the reason."""
    before = files(image.parent)
    with pytest.raises(DisksDiffer) as refusal:
        await restore_guest("restored", image, parts.bare("-m", "64M", *options), **how)
    assert files(image.parent) == before
    assert list(Registry().entries()) == []
    return str(refusal.value)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and contents of all files in a folder, except working sets."""
    found = [path for path in folder.iterdir() if path.suffix != ".ws"]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("kind", ["raw", "qcow2", "overlay"])
@pytest.mark.parametrize("how", ["lazy", "stop", "paused"])
def test_guest_is_restored_over_its_unchanged_disk(parts: GuestParts, tmp_path: Path, kind: str, how: str) -> None:
    """QEMU writes metadata of a qcow2 image when it pauses a guest, unless the metadata has been flushed."""

    async def run() -> None:
        options, image = disk_of_kind(tmp_path, kind), tmp_path / "image"
        await saved(parts, image, options, paused=how == "paused", mode="lazy" if how == "paused" else how)
        for _ in range(2):
            await restores(parts, image, options)
        os.utime(tmp_path / "disk")
        assert "has changed since the checkpoint" in await refused(parts, image, options)

    asyncio.run(run())


@pytest.mark.every_qemu
@pytest.mark.parametrize("kind", ["raw", "qcow2", "overlay"])
def test_restore_over_a_changed_disk_is_refused(parts: GuestParts, tmp_path: Path, kind: str) -> None:
    async def run() -> None:
        options, image = disk_of_kind(tmp_path, kind), tmp_path / "image"
        workload = await QemuWorkload.start("saved", parts.bare("-m", "64M", *options))
        await pageferry.checkpoint_async(workload, image)
        await write("saved")
        await workload.discard()
        assert "has changed since the checkpoint" in await refused(parts, image, options)
        await restores(parts, image, options, **AS_IS)

    asyncio.run(run())


def test_disk_whose_time_settles_during_the_pause_is_known(
    parts: GuestParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU itself writes to a disk when it pauses a guest. The clock can tick before the guest resumes."""
    examined: list[int] = []

    def settled(modified: int, fs: str) -> bool:
        examined.append(modified)
        return len(examined) > 1

    monkeypatch.setattr("pageferry.workloads.qemu.disk_files._is_settled", settled)

    async def run() -> None:
        options, image = disk_of_kind(tmp_path, "raw"), tmp_path / "image"
        await saved(parts, image, options)
        await restores(parts, image, options)

    asyncio.run(run())
    assert len(examined) > 1


def test_write_just_before_the_snapshot_point_leaves_a_disk_unknown(
    parts: GuestParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write of the running guest in the same tick of the clock would not change the modification time again."""
    monkeypatch.setattr("pageferry.workloads.qemu.disk_files._is_settled", lambda modified, fs: False)

    async def run() -> None:
        options, image = disk_of_kind(tmp_path, "raw"), tmp_path / "image"
        await saved(parts, image, options)
        assert "milliseconds before" in await refused(parts, image, options)

    asyncio.run(run())


def test_copy_of_a_disk_requires_the_users_word(parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        options, image = disk_of_kind(tmp_path, "raw"), tmp_path / "image"
        await saved(parts, image, options, paused=True)
        copy = drive(Path(shutil.copy2(tmp_path / "disk", tmp_path / "copy")), "a")
        said = await refused(parts, image, copy)
        assert f"{tmp_path}/copy (a) cannot be shown to be {tmp_path}/disk, the disk of the checkpoint" in said
        assert "--disks as-is" in said
        await restores(parts, image, copy, **AS_IS)
        larger = drive(raw(tmp_path / "larger", 2 << 20), "a")
        assert "a of restored has 2097152 bytes" in await refused(parts, image, larger, **AS_IS)

    asyncio.run(run())


@pytest.mark.every_qemu
def test_empty_overlay_over_an_unchanged_disk_is_accepted(parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        options, image = disk_of_kind(tmp_path, "raw"), tmp_path / "image"
        await saved(parts, image, options)
        overlay = drive(qcow2(tmp_path / "overlay", backing=tmp_path / "disk"), "a", kind="qcow2")
        for temporary in ((*options[:1], f"{options[1]},snapshot=on"), overlay):
            workload, _ = await restore_guest("restored", image, parts.bare("-m", "64M", *temporary))
            await write("restored")
            await workload.discard()
        assert "the format" in await refused(parts, image, overlay)
        os.utime(tmp_path / "disk")
        fresh = drive(qcow2(tmp_path / "fresh", backing=tmp_path / "disk"), "a", kind="qcow2")
        assert "has changed" in await refused(parts, image, fresh)

    asyncio.run(run())


def test_temporary_overlay_of_the_saved_guest_is_named(
    parts: GuestParts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        options, image = drive(raw(tmp_path / "disk"), "a", "snapshot=on"), tmp_path / "image"
        await saved(parts, image, options)
        assert "the data in temporary overlays (snapshot=on: a) will be lost with the guest" in caplog.text
        said = await refused(parts, image, options)
        assert "the disk a was saved with a temporary overlay (snapshot=on)" in said
        assert (
            "save such a guest with --disks copy:DIR; if the guest had not written to the disk, use --disks as-is"
            in said
        )
        await restores(parts, image, options, **AS_IS)

        with pytest.raises(UnsupportedError, match=r"a: its overlay is temporary .* use --disks copy:DIR"):
            await saved(parts, image, options, disks="snapshot")
        (copies := tmp_path / "copies").mkdir()
        await saved(parts, image, options, disks=f"copy:{copies}")
        workload, _ = await restore_guest("restored", image, parts.bare("-m", "64M", *options))
        said = await ask("restored", "human-monitor-command", command_line='qemu-io a "read -P 7 64k 64k"')
        assert "failed" not in said
        await workload.discard()

    asyncio.run(run())


def test_read_only_disk_must_be_unchanged(parts: GuestParts, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        options, image = drive(raw(tmp_path / "disk"), "a", "readonly=on"), tmp_path / "image"
        workload = await QemuWorkload.start("saved", parts.bare("-m", "64M", *options))
        await pageferry.checkpoint_async(workload, image)
        await workload.discard()
        await restores(parts, image, options)
        (tmp_path / "disk").write_bytes(b"\1" * (1 << 20))
        assert "has changed" in await refused(parts, image, options)
        assert "is writable" in await refused(parts, image, drive(tmp_path / "disk", "a"), **AS_IS)

    asyncio.run(run())
    assert "does not contain the disks" not in caplog.text


def test_export_requires_the_users_word(parts: GuestParts, tmp_path: Path) -> None:
    async def run() -> None:
        image = tmp_path / "image"
        server = await QemuWorkload.start("server", parts.bare("-m", "64M"))
        await ask("server", "nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
        file = {"driver": "file", "filename": str(raw(tmp_path / "disk"))}
        await ask("server", "blockdev-add", driver="raw", node_name="d", file=file)
        await ask("server", "block-export-add", type="nbd", id="d", node_name="d", writable=True)
        options = ("-drive", f"file=nbd+unix:///d?socket={tmp_path}/nbd,format=raw,if=virtio,id=a")
        await saved(parts, image, options)
        with pytest.raises(DisksDiffer, match="cannot determine whether nbd"):
            await restores(parts, image, options)
        await restores(parts, image, options, **AS_IS)
        await server.discard()

    asyncio.run(run())


def test_image_without_a_record_requires_the_users_word(parts: GuestParts, tmp_path: Path) -> None:
    """Images of earlier versions of pageferry do not describe disks."""

    def older(workload: QemuWorkload) -> Identity:
        return Identity("qemu", workload.name, workload._seen.machine.details)

    async def nothing(workload: QemuWorkload) -> SnapshotDetails:
        return SnapshotDetails({})

    async def run() -> None:
        options, image = disk_of_kind(tmp_path, "raw"), tmp_path / "image"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QemuWorkload, "identity", property(older))
            patch.setattr(QemuWorkload, "snapshot_details", nothing)
            await saved(parts, image, options)
        assert "describes no disks" in await refused(parts, image, options)
        await restores(parts, image, options, **AS_IS)

    asyncio.run(run())


def test_medium_that_changes_during_a_checkpoint_leaves_disks_unknown(
    parts: GuestParts, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another client of the monitor ejects a medium after the disks have been examined."""
    note = QemuWorkload.note_details

    async def note_and_eject(workload: QemuWorkload) -> None:
        await note(workload)
        await (await workload._control.hold()).execute("eject", device="cd", force=True)

    async def run() -> None:
        monkeypatch.setattr(QemuWorkload, "note_details", note_and_eject)
        medium = f"file={raw(tmp_path / 'medium')},format=raw,if=none,id=cd,readonly=on"
        options, image = disk_of_kind(tmp_path, "raw"), tmp_path / "image"
        await saved(parts, image, [*options, "-drive", medium, "-device", "ide-cd,drive=cd"])
        empty = [*options, "-drive", "if=none,id=cd", "-device", "ide-cd,drive=cd"]
        assert "cannot determine whether" in await refused(parts, image, empty)
        await restores(parts, image, empty, **AS_IS)

    asyncio.run(run())
    assert "disks or media were changed during the checkpoint" in caplog.text


def test_commands_report_disks(parts: GuestParts, tmp_path: Path) -> None:
    def said(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pageferry", *words]
        environment = {**os.environ, "COLUMNS": "300"}
        done = subprocess.run(command, timeout=DEADLINE, capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stderr
        return done

    options, image = disk_of_kind(tmp_path, "overlay"), str(tmp_path / "image")
    command = parts.bare("-m", "64M", *options, "-drive", "if=none,id=cd", "-device", "ide-cd,drive=cd")
    said("run", "saved", "--detach", "--", *command)
    warning = said("checkpoint", "saved", image).stderr
    assert "saved: the image does not contain the disks (a)" in " ".join(warning.split())
    said("stop", "saved")
    disk, empty = json.loads(said("image", "info", image, "--output", "json").stdout)["disks"]
    assert (disk["name"], disk["size"], disk["read-only"], disk["cache"]) == ("a", 1 << 20, False, "buffered")
    layers = [(layer["path"], layer["format"], layer["driver"]) for layer in disk["layers"]]
    assert layers == [(f"{tmp_path}/disk", "qcow2", "file"), (f"{tmp_path}/base", "raw", "file")]
    assert (empty["name"], empty["size"], empty["layers"]) == ("cd", 0, [])
    shown = said("image", "info", image).stdout
    assert f"a: {tmp_path}/disk (qcow2) over {tmp_path}/base (raw), 1 MiB, modified " in shown
    assert "cd: empty" in shown
    os.utime(tmp_path / "base")
    failed = said("restore", "restored", image, "--detach", "--", *command, code=33)
    assert "has changed since the checkpoint" in " ".join(failed.stderr.split())
    said("restore", "restored", image, "--detach", "--disks", "as-is", "--", *command)
    said("stop", "restored")
