"""Tests of the records of bases and clones: which process and which file a record refers to."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from pageferry.errors import RestoreError
from pageferry.host import proc
from pageferry.host.registry import CLONE_FILE, QemuEntry, Registry, identify
from pageferry.images.metadata import ImageIdentity
from pageferry.pager import base_client, base_records, launcher
from pageferry.pager.base_records import BaseFolder, BaseRecord, CloneRecord
from pageferry.pager.orders import BaseOpened

IDENTITY = ImageIdentity(id="01" * 16, digest="02" * 8)
RECORD = CloneRecord(image="/image", identity=IDENTITY, pid=os.getpid(), regions=[])


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "run")


@pytest.fixture
def base(tmp_path: Path) -> Iterator[int]:
    """Yield a read-only descriptor of a file, such as QEMU has of its base."""
    (tmp_path / "base").write_bytes(b"contents")
    os.chmod(tmp_path / "base", base_records.MODE)
    descriptor = os.open(tmp_path / "base", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def of_base(descriptor: int) -> CloneRecord:
    """Return the record of this process as a clone, with its base at a descriptor."""
    file = os.fstat(descriptor)
    return msgspec.structs.replace(RECORD, descriptor=descriptor, device=file.st_dev, inode=file.st_ino)


def test_base_of_a_clone_is_opened_for_writing(base: int) -> None:
    opened = base_records.reopen_base(of_base(base))
    try:
        assert os.path.samestat(os.fstat(opened), os.fstat(base))
        os.pwrite(opened, b"C", 0)
        assert os.fstat(base).st_mode & 0o777 == base_records.MODE
    finally:
        os.close(opened)


def test_file_that_has_replaced_the_base_is_neither_opened_nor_changed(base: int, tmp_path: Path) -> None:
    (tmp_path / "other").touch(mode=0o644)
    with open(tmp_path / "other", "rb") as other:
        record = msgspec.structs.replace(of_base(base), descriptor=other.fileno())
        with pytest.raises(OSError, match="another file"):
            base_records.reopen_base(record)
        assert os.fstat(other.fileno()).st_mode & 0o777 == 0o644


def test_base_of_a_pager_is_opened_only_if_the_descriptor_is_still_this_file(base: int, tmp_path: Path) -> None:
    file = os.fstat(base)
    opened = base_records.reopen(os.getpid(), base, file.st_dev, file.st_ino)
    try:
        assert os.path.samestat(os.fstat(opened), file)
    finally:
        os.close(opened)
    os.mkfifo(tmp_path / "pipe")  # open(2) of a FIFO waits for its other end
    other = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        reply = BaseOpened(
            pager=os.getpid(), descriptor=other, device=file.st_dev, inode=file.st_ino, identity=IDENTITY
        )
        with pytest.raises(RestoreError, match=r"cannot open the base of /image: .* refers to another file; retry"):
            base_client.open_file(reply, "/image")
    finally:
        os.close(other)


def test_record_without_the_file_of_a_base_is_not_used(base: int) -> None:
    with pytest.raises(OSError, match="another file"):
        base_records.reopen_base(msgspec.structs.replace(RECORD, descriptor=base))


@pytest.mark.parametrize(("pid", "started", "found"), [(0, 0, ["web"]), (1, 0, []), (0, 1, [])])
def test_clone_counts_only_if_its_entry_is_alive_and_of_the_same_process(
    registry: Registry, pid: int, started: int, found: list[str]
) -> None:
    entry, folder = QemuEntry(**identify(os.getpid()), qmp_socket="/nowhere"), registry.claim("web")
    folder.publish(msgspec.structs.replace(entry, started=entry.started + started))
    folder.store(CLONE_FILE, msgspec.structs.replace(RECORD, pid=RECORD.pid + pid))
    assert [one.name for one in base_records.clones_of(registry, IDENTITY)] == found
    assert list(base_records.clones_of(registry, ImageIdentity(id="0" * 32, digest="0" * 16))) == []


@pytest.mark.parametrize(("started", "found"), [(0, ["process-1-1"]), (1, [])])
def test_program_counts_only_while_its_process_runs(registry: Registry, started: int, found: list[str]) -> None:
    folder, running = BaseFolder.of(registry, IDENTITY), proc.start_time(os.getpid()) or 0
    folder.path.mkdir(parents=True)
    folder.add_program("process-1-1", msgspec.structs.replace(RECORD, started=running + started))
    assert [one.name for one in base_records.clones_of(registry, IDENTITY)] == found
    assert (base_records.find_program(registry, "process-1-1") is not None) == bool(found)
    assert base_records.find_program(registry, "process-1-2") is None


def test_lock_of_a_directory_that_is_replaced_meanwhile_is_that_of_the_new_one(registry: Registry) -> None:
    folder, other = BaseFolder.of(registry, IDENTITY), BaseFolder.of(registry, IDENTITY)
    flock = fcntl.flock
    replaced: list[bool] = []

    def replace_first(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_NB and not replaced:  # the lock of the base, not that of the registry
            replaced.append(True)
            other.remove()
            other.path.mkdir()
            (other.path / "lock").touch(mode=0o600)
        flock(descriptor, how)

    with patch.object(fcntl, "flock", replace_first):
        lock = folder.lock()
    assert lock is not None
    try:
        assert os.path.samestat(os.fstat(lock), os.stat(folder.path / "lock"))
        assert other.lock() is None
    finally:
        os.close(lock)


def test_state_of_an_open_image_is_not_that_of_a_file_that_has_replaced_it(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"image")
    with open(path, "rb") as opened:
        assert base_records.image_stat(path, opened.fileno()) == base_records.image_stat(path)
        (tmp_path / "new").write_bytes(b"image")
        os.rename(tmp_path / "new", path)
        assert base_records.image_stat(path, opened.fileno()) != base_records.image_stat(path)


def test_pager_that_does_not_reply_is_reported(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_REPLY_TIMEOUT", 0.1)
    image, folder = tmp_path / "image", BaseFolder.of(registry, IDENTITY)
    image.touch()
    lock = folder.lock()
    assert lock is not None
    stat = base_records.image_stat(image)
    folder.store(BaseRecord(image=str(image), identity=IDENTITY, stat=stat, pager=os.getpid()))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(folder.socket)
        listener.listen(1)
        for connect in (lambda: launcher.connect_to_base(registry, image), lambda: launcher.status_of_base(folder)):
            with pytest.raises(RestoreError, match=rf"process {os.getpid()}\): no reply"):
                connect()
            listener.accept()[0].close()
        closing = threading.Thread(target=lambda: listener.accept()[0].close())
        closing.start()
        assert launcher.connect_to_base(registry, image) is None  # an exiting pager closes the connection
        closing.join()
    os.close(lock)
