"""Tests of the overlays of a restore that is cancelled while it creates them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pageferry.checkpoints import restore_disks
from pageferry.checkpoints.restore_disks import GuestDisks
from pageferry.workloads.qemu import block_devices, frozen_files, qcow2
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord, Host, Layer

MIB = 1 << 20


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a disk that was saved with every image of the test."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    layer = Layer(format="raw", path=str(path), size=MIB, driver="file")
    device = BlockDevice(id="a", name="a", layers=(layer,), saved=(layer,))
    record = DiskRecord(host=Host(boot="b", machine="m"), devices=(device,))
    metadata = SimpleNamespace(details={"disks": block_devices.encode(record)})
    monkeypatch.setattr(restore_disks, "open_link", lambda _: SimpleNamespace(metadata=metadata))
    return path


def command(saved: Path) -> list[str]:
    return ["qemu-system-x86_64", "-drive", f"file={saved},format=raw,if=virtio,id=a"]


def left_by(saved: Path) -> list[str]:
    return sorted(one.name for one in saved.parent.iterdir() if one != saved)


def test_discard_removes_the_overlay_and_its_need(saved: Path) -> None:
    disks = GuestDisks("web", saved.parent / "image", None)
    assert disks.prepare(command(saved)) != command(saved)
    assert frozen_files.find(saved) is not None
    disks.discard()
    disks.discard()
    assert left_by(saved) == []


def test_cancelled_restore_creates_no_overlay(saved: Path) -> None:
    disks = GuestDisks("web", saved.parent / "image", None)
    disks.discard()
    disks.prepare(command(saved))
    assert left_by(saved) == []


def test_discard_waits_for_an_overlay_that_is_being_created(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = GuestDisks("web", saved.parent / "image", None)
    begun, write = threading.Event(), qcow2.write_empty

    def slowly(descriptor: int, size: int, backing: qcow2.Backing) -> None:
        begun.set()
        time.sleep(0.2)
        write(descriptor, size, backing)

    monkeypatch.setattr(qcow2, "write_empty", slowly)
    discarding = threading.Thread(target=disks.discard)
    preparing = threading.Thread(target=disks.prepare, args=[command(saved)])
    preparing.start()
    assert begun.wait(30)
    discarding.start()
    preparing.join()
    discarding.join()
    assert left_by(saved) == []
