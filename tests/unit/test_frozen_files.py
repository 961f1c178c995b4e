"""Tests of the records of frozen files."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from pageferry.errors import UsageError, WorkloadError
from pageferry.workloads.qemu import disk_cache, frozen_files
from pageferry.workloads.qemu.frozen_files import Need


def frozen(folder: Path) -> tuple[Path, Path]:
    """Return a frozen file, and the overlay that needs it."""
    file, overlay = folder / "disk", folder / "overlay"
    file.write_text("contents")
    overlay.touch()
    os.chmod(file, 0o640)
    frozen_files.require(file, Need(kind="overlay", path=str(overlay)))
    frozen_files.seal(file)
    return file, overlay


def test_frozen_file_is_read_only_until_nothing_needs_it(tmp_path: Path) -> None:
    file, overlay = frozen(tmp_path)
    other = tmp_path / "other"
    frozen_files.require(file, Need(kind="overlay", path=str(other)))
    assert file.stat().st_mode & 0o777 == 0o440
    frozen_files.release(file, Need(kind="overlay", path=str(overlay)))
    assert file.stat().st_mode & 0o777 == 0o440
    frozen_files.release(file, Need(kind="overlay", path=str(other)))
    assert file.stat().st_mode & 0o777 == 0o640
    assert frozen_files.find(file) is None


def test_guest_may_not_write_to_a_file_that_an_overlay_needs(tmp_path: Path) -> None:
    file, overlay = frozen(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(file)
    for path in (file, link):
        with pytest.raises(UsageError, match=rf"cannot start web: .* frozen: overlay {overlay} needs its contents"):
            frozen_files.check_writable(path, "web")
    overlay.unlink()
    frozen_files.check_writable(link, "web")
    assert file.stat().st_mode & 0o200
    assert not frozen_files.record_path(file).exists()


def test_image_that_does_not_exist_needs_nothing(tmp_path: Path) -> None:
    need = Need(kind="image", path=str(tmp_path / "image"), id="0" * 32)
    assert not need.exists
    (tmp_path / "image").write_text("another file")
    assert not need.exists


@pytest.mark.parametrize("replaced", ["folder", "file", "nothing"])
def test_overlay_in_a_directory_that_is_not_mounted_counts_as_existing(tmp_path: Path, replaced: str) -> None:
    folder, file = tmp_path / "mounted", tmp_path / "disk"
    folder.mkdir()
    file.write_text("contents")
    overlay = folder / "overlay"
    overlay.touch()
    frozen_files.require(file, Need(kind="overlay", path=str(overlay)))
    frozen_files.seal(file)
    folder.rename(tmp_path / "elsewhere")
    if replaced == "folder":
        folder.mkdir()
    elif replaced == "file":
        folder.touch()
    message = rf"overlay {overlay} \(it may exist: .* remove {file}\.frozen if they are gone"
    with pytest.raises(UsageError, match=message):
        frozen_files.check_writable(file, "web")
    assert not file.stat().st_mode & 0o222


def test_record_keeps_the_need_of_an_image_until_it_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.write_text("contents")
    old, new = (Need(kind="image", path=str(tmp_path / "image"), id=id) for id in ("a", "b"))
    frozen_files.require(file, old)
    frozen_files.require(file, new)
    frozen_files.release(file, new)
    found = frozen_files.find(file)
    assert found is not None
    assert [need.key for need in found.needs] == [old.key]


def test_file_that_another_process_has_locked_is_frozen(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.write_text("contents")
    with file.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        frozen_files.require(file, Need(kind="overlay", path=str(tmp_path / "overlay")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "disk.frozen"]


def test_lock_of_another_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_files, "_LOCK_TIMEOUT", 0.1)
    file, overlay = frozen(tmp_path)
    with (tmp_path / "disk.frozen.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WorkloadError, match=rf"cannot lock {file}\.frozen\.lock within 0\.1 s"):
            frozen_files.release(file, Need(kind="overlay", path=str(overlay)))
    frozen_files.release(file, Need(kind="overlay", path=str(overlay)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "overlay"]


def test_permissions_of_a_file_that_has_replaced_a_frozen_file_are_kept(tmp_path: Path) -> None:
    file, other = tmp_path / "disk", tmp_path / "other"
    other.touch(0o644)
    file.symlink_to(other)
    with pytest.raises(OSError, match="symbolic link"):
        frozen_files._change_mode(file, other.stat().st_ino, lambda mode: 0)
    frozen_files._change_mode(other, other.stat().st_ino + 1, lambda mode: 0)
    assert other.stat().st_mode & 0o777 == 0o644


def test_file_that_has_replaced_a_frozen_file_is_not_frozen(tmp_path: Path) -> None:
    file, _ = frozen(tmp_path)
    (tmp_path / "new").write_text("new")
    (tmp_path / "new").rename(file)
    assert frozen_files.find(file) is None
    frozen_files.check_writable(file, "web")


def test_record_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    file, _ = frozen(tmp_path)
    frozen_files.record_path(file).write_text("{")
    with pytest.raises(WorkloadError, match=rf"cannot read {file}\.frozen"):
        frozen_files.check_writable(file, "web")


def test_file_without_room_for_a_record_beside_it_cannot_be_frozen(tmp_path: Path) -> None:
    file = tmp_path / ("d" * 250)
    file.touch()
    need = Need(kind="overlay", path=str(tmp_path / "overlay"))
    with pytest.raises(WorkloadError, match=r"cannot write .*\.frozen: File name too long; allow pageferry"):
        frozen_files.require(file, need)
    frozen_files.release(file, need)
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.geteuid() != 0, reason="requires root, which can give files to other users")
def test_record_of_another_user_is_ignored(tmp_path: Path) -> None:
    file, _ = frozen(tmp_path)
    os.chown(frozen_files.record_path(file), 65534, 65534)
    assert frozen_files.find(file) is None


def test_flush_ends_after_a_short_pass(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.write_bytes(bytes(1 << 20))
    assert 1 <= disk_cache.flush([str(file), str(tmp_path / "missing")]) <= 20
