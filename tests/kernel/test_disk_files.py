"""Tests of the files behind disks, with this process in place of QEMU."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.workloads.qemu import disk_files
from pageferry.workloads.qemu.block_devices import File
from pageferry.workloads.qemu.disk_files import DiskFiles
from tests.guest.disks import qcow2, raw


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return the path of a raw disk that this process has open."""
    path = raw(tmp_path / "disk")
    with path.open("rb"):
        yield path


def found(path: str, fdsets: dict[int, int] | None = None) -> DiskFiles:
    return DiskFiles.find(os.getpid(), [path], fdsets or {})


def inode(file: File | None) -> int:
    assert file is not None
    return file.inode


def test_open_file_is_found_by_its_path(disk: Path) -> None:
    file = found(str(disk)).get(str(disk))
    assert file is not None
    expected, system = disk.stat(), os.statvfs(disk)
    assert (file.kind, file.device, file.inode) == ("file", expected.st_dev, expected.st_ino)
    assert file.fsid == system.f_fsid
    mount = subprocess.run(["findmnt", "-nT", disk, "-o", "FSTYPE,SOURCE"], capture_output=True, text=True, check=True)
    assert [file.fs, file.source.partition("[")[0]] == mount.stdout.split()


def test_open_file_is_found_by_a_relative_path_and_a_link(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk.parent)
    (disk.parent / "link").symlink_to(disk)
    for path in ("disk", "../" + disk.parent.name + "/disk", "link", str(disk.parent / "link")):
        assert inode(found(path).get(path)) == disk.stat().st_ino


def test_file_that_is_not_open_is_not_found(tmp_path: Path) -> None:
    path = str(raw(tmp_path / "closed"))
    assert found(path).get(path) is None
    assert found("nbd://host/x").get("nbd://host/x") is None


def test_deleted_and_replaced_file_is_the_open_file(disk: Path) -> None:
    before = disk.stat().st_ino
    disk.unlink()
    assert inode(found(str(disk)).get(str(disk))) == before
    with raw(disk, 5).open("rb"):
        files = found(str(disk))
    assert files.get(str(disk)) is not None


def test_passed_descriptor_is_found_by_its_set(disk: Path) -> None:
    with disk.open("rb") as opened:
        path = "/dev/fdset/3"
        assert inode(found(path, {3: opened.fileno()}).get(path)) == disk.stat().st_ino
        assert found(path, {4: opened.fileno()}).get(path) is None


def test_generation_follows_writes(disk: Path) -> None:
    files = found(str(disk))
    os.utime(disk, ns=(0, 1_700_000_000_123_456_789))
    first = files.generation(str(disk))
    assert first is not None
    assert (first.size, first.modified, first.settled) == (1 << 20, 1_700_000_000_123_456_789, True)
    disk.write_bytes(b"x")
    second = files.generation(str(disk))
    assert second is not None
    assert second.size == 1
    assert abs(second.modified - time.time_ns()) < 10 * 10**9


def test_generation_of_a_replaced_or_closed_file_is_unknown(tmp_path: Path) -> None:
    path = raw(tmp_path / "disk")
    with path.open("rb"):
        files = found(str(path))
        path.unlink()
        assert files.generation(str(path)) is not None  # still open
    assert files.generation(str(path)) is None
    with raw(path).open("rb"):
        replaced = files.generation(str(path))
        assert replaced is None or path.stat().st_ino == inode(files.get(str(path)))  # the inode number may be reused


@pytest.mark.parametrize(
    ("age", "fs", "settled"),
    [
        (0, "ext4", False),
        (20_000_000, "ext4", True),
        (20_000_000, "nfs4", False),
        (100_000_000, "nfs4", True),
    ],
)
def test_modification_time_is_settled_after_a_tick(age: int, fs: str, settled: bool) -> None:
    now = time.clock_gettime_ns(disk_files._CLOCK_REALTIME_COARSE)
    modified = now - age + (0 if settled else 5_000_000)
    modified += modified % 10**9 == 0
    assert disk_files._is_settled(modified, fs) is settled


def test_modification_time_in_seconds_is_settled_after_two_seconds() -> None:
    second = time.time_ns() // 10**9 * 10**9
    assert not disk_files._is_settled(second - 10**9, "ext4")
    assert disk_files._is_settled(second - 3 * 10**9, "ext4")


def test_overlay_is_empty_until_it_contains_data(tmp_path: Path) -> None:
    path = qcow2(tmp_path / "overlay", backing=raw(tmp_path / "base"))
    with path.open("r+b") as file:
        files = found(str(path))
        assert files.is_empty_overlay(str(path))
        file.seek(3 << 16)
        file.write(b"\x80")
        file.flush()
        assert not files.is_empty_overlay(str(path))


@pytest.mark.parametrize(
    "change", [(4, b"\0\0\0\2"), (72, b"\0\0\0\0\0\0\0\4"), (36, b"\xff\xff\xff\xff"), (0, b"raw?")]
)
def test_unsupported_overlay_is_not_empty(tmp_path: Path, change: tuple[int, bytes]) -> None:
    path = qcow2(tmp_path / "overlay")
    with path.open("r+b") as file:
        file.seek(change[0])
        file.write(change[1])
        file.flush()
        assert not found(str(path)).is_empty_overlay(str(path))


def test_short_file_is_not_an_empty_overlay(disk: Path) -> None:
    disk.write_bytes(b"QFI\xfb")
    assert not found(str(disk)).is_empty_overlay(str(disk))


def test_host_is_described_by_digests() -> None:
    host = disk_files.host()
    assert host == disk_files.host()
    assert len(host.boot) == 32
    assert host.boot not in Path("/proc/sys/kernel/random/boot_id").read_text()


@pytest.fixture
def loop_device(root: None, tmp_path: Path) -> Iterator[Path]:
    """Return the path of a zero-filled 8 MiB block device that this process keeps open."""
    contents = raw(tmp_path / "contents", 8 << 20)
    attached = subprocess.run(["losetup", "--find", "--show", contents], capture_output=True, text=True)
    if attached.returncode != 0:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    try:
        with open(attached.stdout.strip(), "rb") as device:
            yield Path(device.name)
    finally:
        subprocess.run(["losetup", "--detach", attached.stdout.strip()], check=True)


@pytest.mark.parametrize("start", [1024, (8 << 20) - 512])
def test_block_device_with_data_at_its_ends_is_not_blank(loop_device: Path, start: int) -> None:
    path = str(loop_device)
    assert found(path).is_blank_device(path)
    with loop_device.open("r+b") as device:
        device.seek(start)
        device.write(b"x" * 512)
    assert not found(path).is_blank_device(path)


def test_file_is_not_a_blank_device(disk: Path) -> None:
    assert not found(str(disk)).is_blank_device(str(disk))
