"""Tests that a guest gets its own disks: at the destination of a migration, and when it is restored from an image."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import pageferry
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.errors import DisksDiffer
from pageferry.host.registry import Registry
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, ask, travelling
from tests.kernel import moving

pytestmark = pytest.mark.usefixtures("root")

MIB = 1 << 20


def raw(path: Path, size: int = MIB) -> Path:
    """Create a raw disk."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def drive(path: Path, name: str, kind: str = "raw", *more: str) -> tuple[str, str]:
    """Return the QEMU options that attach a disk."""
    return "-drive", ",".join((f"file={path}", f"format={kind}", "if=virtio", f"id={name}", *more))


def machine(parts: GuestParts, folder: Path, *options: str) -> Traveller:
    """Return a machine without a guest system that runs and can be migrated."""
    return Traveller(parts, folder, *options, memory="64M", checker=None)


def refused(guest: Traveller, options: Sequence[str], *arguments: str) -> str:
    """Migrate a guest to a receiver with other options. Check that the receiver refuses the guest, which keeps running.
    Return the reason."""
    command = guest.parts.bare("-m", guest.memory, *options)
    with guest.receiver(command=command) as there:
        with guest.migrating(moving.address_of(there), *arguments, stderr=subprocess.PIPE) as migration:
            said = migration.process.communicate()[1].decode()
            assert migration.process.returncode == 21, said
        there.process.terminate()
        there.wait()
    guest.untouched()
    assert guest.qmp("query-status")["running"]
    return " ".join(said.split())


def test_migration_to_disks_in_another_order_is_refused(parts: GuestParts, tmp_path: Path) -> None:
    one, two = raw(tmp_path / "one"), raw(tmp_path / "two")
    with travelling(parts, tmp_path, *drive(one, "a"), *drive(two, "b"), memory="64M", checker=None) as guest:
        said = refused(guest, [*drive(two, "a"), *drive(one, "b")])
        assert f"{two} (a of" in said
        assert f"is not {one} of the source, but b" in said
        guest.move()


def test_restore_over_a_changed_disk_is_refused(parts: GuestParts, tmp_path: Path, registry: Registry) -> None:
    disk = raw(tmp_path / "disk")
    command = parts.bare("-m", "64M", *drive(disk, "a"))

    async def run() -> None:
        workload = await QemuWorkload.start("saved", command)
        await pageferry.checkpoint_async(workload, tmp_path / "image")
        await ask("saved", "human-monitor-command", command_line='qemu-io a "write -P 7 0 512"')
        await workload.discard()
        before = disk.read_bytes(), os.stat(disk).st_mtime_ns
        with pytest.raises(DisksDiffer, match="has changed since the checkpoint"):
            await restore_guest("restored", tmp_path / "image", command)
        assert before == (disk.read_bytes(), os.stat(disk).st_mtime_ns)
        assert list(registry.entries()) == []
        workload, _ = await restore_guest("restored", tmp_path / "image", command, disks="as-is")
        await workload.discard()

    asyncio.run(run())
