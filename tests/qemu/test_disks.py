"""Tests that a guest has its own disks at the destination of a migration, or keeps running at the source."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest.disks import drive, qcow2, raw
from tests.guest.machines import GuestParts
from tests.guest.travel import Traveller, travelling
from tests.kernel import moving
from tests.network import strangers

pytestmark = pytest.mark.usefixtures("root")

MIB = 1 << 20


def bare(parts: GuestParts, folder: Path, *options: str, **details: Any) -> Any:
    """Return a context manager for a machine without a guest system."""
    return travelling(parts, folder, *options, memory="64M", checker=None, **details)


def refused(guest: Traveller, options: Sequence[str], *arguments: str) -> str:
    """Migrate a guest to a receiver with other options. Check that the receiver refuses the guest, which keeps running.
    Return the reason."""
    command = guest.parts.bare("-m", guest.memory, *options)
    with guest.receiver(command=command) as there:
        said = fails(guest, moving.address_of(there), 21, *arguments)
        there.process.terminate()
        there.wait()
    guest.untouched()
    assert guest.qmp("query-status")["running"]
    return said


def fails(guest: Traveller, address: str, code: int, *arguments: str) -> str:
    """Migrate a guest. Check that this fails with the exit code `code`. Return the message."""
    with guest.migrating(address, *arguments, stderr=subprocess.PIPE) as migration:
        said = migration.process.communicate()[1].decode()
        assert migration.process.returncode == code, said
    return " ".join(said.split())


def moves_to(guest: Traveller, options: Sequence[str], *arguments: str) -> None:
    """Migrate a guest to a machine with other options. Check that it runs there."""
    guest.options = tuple(options)
    guest.move(*arguments)
    assert guest.qmp("query-status")["running"]


@pytest.mark.every_qemu
def test_disks_in_another_order_are_refused(parts: GuestParts, tmp_path: Path) -> None:
    one, two = raw(tmp_path / "one"), raw(tmp_path / "two")
    with bare(parts, tmp_path, *drive(one, "a"), *drive(two, "b")) as guest:
        said = refused(guest, [*drive(two, "a"), *drive(one, "b")])
        assert f"{two} (a of guest-1 at the destination) is not {one} of the source, but b; " in said
        guest.move()


def test_disk_of_another_size_is_refused_in_any_case(parts: GuestParts, tmp_path: Path) -> None:
    options = drive(raw(tmp_path / "disk", 64 * MIB), "a")
    smaller = drive(raw(tmp_path / "smaller", 8 * MIB), "a")
    with bare(parts, tmp_path, *options) as guest:
        for arguments in ((), ("--disks", "shared")):
            said = refused(guest, smaller, *arguments)
            assert "a of the source has 67108864 bytes, a of guest-1 at the destination has 8388608 bytes" in said


def test_another_file_is_refused_unless_the_user_insists(parts: GuestParts, tmp_path: Path) -> None:
    disk, copy = raw(tmp_path / "disk"), raw(tmp_path / "copy")
    with bare(parts, tmp_path, *drive(disk, "a")) as guest:
        said = refused(guest, drive(copy, "a"))
        assert f"is not {disk} of the source" in said
        assert "--disks shared" in said
        moves_to(guest, drive(copy, "a"), "--disks", "shared")


def test_local_file_of_another_host_is_unknown(parts: GuestParts, tmp_path: Path) -> None:
    """Another boot id stands for another host, where the same path and inode may be another file."""
    boot = tmp_path / "boot"
    boot.write_text("2f1c9a52-8c3c-4d0c-9e51-5a0f6f6f9a10\n")
    other = f'mount --bind {boot} /proc/sys/kernel/random/boot_id && exec "$@"'
    options = drive(raw(tmp_path / "disk"), "a")
    with bare(parts, tmp_path, *options) as guest:
        with guest.receiver(within=["unshare", "--mount", "sh", "-c", other, "sh"]) as there:
            said = fails(guest, moving.address_of(there), 21)
            there.process.terminate()
            there.wait()
        assert "cannot be shown to be" in said
        assert "use storage that both hosts mount from one server" in said
        guest.untouched()


def test_replaced_file_at_the_same_path_is_refused(parts: GuestParts, tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk")
    with bare(parts, tmp_path, *drive(disk, "a")) as guest:
        disk.unlink()
        assert "is not" in refused(guest, drive(raw(disk), "a"))


def test_disk_in_another_format_is_refused(parts: GuestParts, tmp_path: Path) -> None:
    options = drive(raw(tmp_path / "raw"), "a")
    other = drive(qcow2(tmp_path / "qcow2"), "a", kind="qcow2")
    with bare(parts, tmp_path, *options) as guest:
        said = refused(guest, other, "--disks", "shared")
        assert "has the format raw, a of guest-1 at the destination has the format qcow2" in said


@pytest.mark.oldest_qemu
def test_backing_chains_are_compared(parts: GuestParts, tmp_path: Path) -> None:
    base, other = raw(tmp_path / "base"), raw(tmp_path / "other")
    options = drive(qcow2(tmp_path / "overlay", backing=base), "a", kind="qcow2")
    with bare(parts, tmp_path, *options) as guest:
        guest.move()
        said = refused(guest, drive(tmp_path / "overlay", "a", f"backing.file.filename={other}", kind="qcow2"))
        assert f"{other} (a of guest-2 at the destination) is not {base} of the source" in said


def nodes(kind: str, path: Path) -> tuple[str, ...]:
    """Return the options of a disk that consists of block nodes, as libvirt's disks do."""
    file = {"driver": "file", "filename": str(path)}
    tops: dict[str, dict[str, Any]] = {
        "throttled": {"driver": "throttle", "throttle-group": "group", "file": {"driver": "raw", "file": file}},
        "part": {"driver": "raw", "offset": 65536, "size": MIB - 65536, "file": file},
        "file": file,
    }
    group = ("-object", "throttle-group,id=group,x-iops-total=1000")
    device = ("-device", "virtio-scsi-pci", "-device", "scsi-hd,drive=top,id=system")
    return (*group, "-blockdev", json.dumps(tops[kind] | {"node-name": "top"}), *device)


@pytest.mark.parametrize("kind", ["throttled", "part", "file"])
def test_block_nodes_are_compared(parts: GuestParts, tmp_path: Path, kind: str) -> None:
    disk, other = raw(tmp_path / "disk"), raw(tmp_path / "other")
    with bare(parts, tmp_path, *nodes(kind, disk)) as guest:
        guest.move()
        assert f"{other} (top of guest-2 at the destination) is not {disk}" in refused(guest, nodes(kind, other))


@pytest.mark.oldest_qemu
@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
def test_disks_are_compared_in_every_mode(parts: GuestParts, tmp_path: Path, mode: str) -> None:
    options, other = drive(raw(tmp_path / "disk"), "a"), drive(raw(tmp_path / "other"), "a")
    with bare(parts, tmp_path, *options) as guest:
        assert "is not" in refused(guest, other, "--mode", mode)
        guest.move("--mode", mode)


def test_disk_with_a_temporary_overlay_is_refused(parts: GuestParts, tmp_path: Path) -> None:
    """With `snapshot=on`, each side would have a separate overlay."""
    options = drive(raw(tmp_path / "disk"), "a", "snapshot=on")
    with bare(parts, tmp_path, *options) as guest:
        said = refused(guest, options)
        assert "a of the source has a temporary overlay (snapshot=on)" in said
        assert "--copy-disks" in said
        moves_to(guest, drive(raw(tmp_path / "copy"), "a"), "--copy-disks")


def test_disk_only_at_the_destination_is_refused(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path) as guest:
        said = refused(guest, ["-drive", f"file={raw(tmp_path / 'disk')},format=raw,if=ide"])
        assert "the source describes no disks" in said


def test_disk_missing_at_the_destination_is_refused(parts: GuestParts, tmp_path: Path) -> None:
    options = [f"file={raw(tmp_path / name)},format=raw,if=ide,id={name}" for name in ("one", "two")]
    with bare(parts, tmp_path, *("-drive", options[0]), *("-drive", options[1])) as guest:
        said = refused(guest, ["-drive", options[0]])
        assert "the source has the drives one, two, guest-1 at the destination has the drives one" in said


def test_read_only_disk_is_compared(parts: GuestParts, tmp_path: Path) -> None:
    disk = raw(tmp_path / "disk")
    with bare(parts, tmp_path, *drive(disk, "a", "readonly=on")) as guest:
        guest.move()
        said = refused(guest, drive(disk, "a"))
        assert "a of the source is read-only, a of guest-2 at the destination is writable" in said
        assert "is not" in refused(guest, drive(raw(tmp_path / "other"), "a", "readonly=on"))


@pytest.mark.every_qemu
def test_empty_drive_is_compared(parts: GuestParts, tmp_path: Path) -> None:
    device = ("-device", "ide-cd,drive=cd")
    empty = ("-drive", "if=none,id=cd", *device)
    with bare(parts, tmp_path, *empty) as guest:
        guest.move()
        medium = ("-drive", f"file={raw(tmp_path / 'medium')},format=raw,if=none,id=cd,readonly=on", *device)
        said = refused(guest, medium)
        assert "cd of the source is empty, cd of guest-2 at the destination has a medium" in said
        file = {"filename": str(tmp_path / "medium"), "format": "raw", "read_only_mode": "read-only"}
        guest.qmp("blockdev-change-medium", device="cd", **file)
        moves_to(guest, medium)


def flash(parts: GuestParts, folder: Path, variables: Path) -> tuple[str, ...]:
    """Return the options of a machine with flash devices for code, which halts the CPU, and for variables."""
    code = folder / "code"
    code.write_bytes(bytes(256 * 1024 - 16) + b"\xf4\xeb\xfd" + bytes(13))
    return (
        *("-drive", f"file={code},format=raw,if=pflash,unit=0,readonly=on"),
        *("-drive", f"file={variables},format=raw,if=pflash,unit=1"),
    )


@pytest.mark.every_qemu
def test_variable_store_is_a_disk(parts: GuestParts, tmp_path: Path) -> None:
    store, other = (raw(tmp_path / name, 64 * 1024) for name in ("store", "other"))
    with bare(parts, tmp_path, *flash(parts, tmp_path, store)) as guest:
        guest.move()
        said = refused(guest, flash(parts, tmp_path, other))
        assert f"{other} (pflash1 of guest-2 at the destination) is not {store} of the source" in said


@contextmanager
def exports(parts: GuestParts, folder: Path) -> Iterator[Path]:
    """Start a QEMU that exports the disks `one` and `two` by NBD. Yield the path of the socket."""
    with bare(parts, folder, name="server") as server:
        server.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "nbd")}})
        for name in ("one", "two"):
            file = {"driver": "file", "filename": str(raw(folder / name))}
            server.qmp("blockdev-add", driver="raw", node_name=name, file=file)
            server.qmp("block-export-add", type="nbd", id=name, node_name=name, writable=True)
        yield folder / "nbd"


@pytest.mark.every_qemu
def test_exports_are_compared(parts: GuestParts, tmp_path: Path) -> None:
    with exports(parts, tmp_path) as socket:
        one, two = (
            ("-drive", f"file=nbd+unix:///{name}?socket={socket},format=raw,if=virtio,id=a") for name in ("one", "two")
        )
        guest = Traveller(parts, tmp_path, *one, memory="64M", checker=None)
        try:
            guest.start()
            command = parts.bare("-m", "64M", *two)
            with guest.receiver(command=command) as there:
                said = fails(guest, moving.address_of(there), 21)
                there.process.terminate()
                there.wait()
            assert f"nbd+unix:///two?socket={socket} (a of guest-1 at the destination) is not" in said
            with guest.receiver() as there, guest.migrating(moving.address_of(there)) as migration:
                assert migration.wait() == there.wait() == 0
            guest.journeys += 1
            assert guest.qmp("query-status")["running"]
        finally:
            guest.end()


def test_disk_that_changes_during_a_migration_is_detected(parts: GuestParts, tmp_path: Path) -> None:
    with bare(parts, tmp_path, *drive(raw(tmp_path / "disk"), "a")) as guest:
        with guest.receiver() as there:
            address = moving.address_of(there)
            with guest.migrating(address, fault="source.set-up=stop", stderr=subprocess.PIPE) as migration:
                moving.stopped(migration)
                file = str(tmp_path / "overlay")
                guest.qmp("blockdev-snapshot-sync", device="a", snapshot_file=file, format="qcow2")
                migration.process.send_signal(signal.SIGCONT)
                said = migration.process.communicate()[1].decode()
                assert migration.process.returncode == 10, said
            assert there.wait() == 21
        assert "was reconfigured" in said
        guest.untouched()
        assert guest.qmp("query-status")["running"]
        guest.options = drive(tmp_path / "overlay", "a", kind="qcow2")
        guest.move()


def test_receiver_that_does_not_compare_disks_is_refused(parts: GuestParts, tmp_path: Path) -> None:
    with (
        bare(parts, tmp_path, *drive(raw(tmp_path / "disk"), "a")) as guest,
        strangers.destination(strangers.welcomes) as address,
    ):
        assert "cannot compare the disks of the guest" in fails(guest, address, 22)
        guest.untouched()
