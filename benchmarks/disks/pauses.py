"""Pauses of checkpoints of two guests: one without a writable disk, and one with a writable disk of 50 MB/s.

Each guest runs a Debian system, in which fio writes 20 MB/s: to memory in the guest without a writable disk, directly
to the disk in the other guest. QEMU uses the page cache of the host, so these writes and further dirty pages of the
disk have to be written when the disk is flushed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.guests import told_by
from benchmarks.disks.slow_disk import dirty, slow_disk
from benchmarks.harness import machine
from benchmarks.harness.bench import Setting
from benchmarks.migrate.pageferry_line import PAGEFERRY, expect, pageferry, reap
from benchmarks.peers.monitor import Monitor
from tests.guest.debian import DebianGuest
from tests.guest.machines import GuestParts

PAUSES = 10
WRITTEN = 64 << 20
"""Size of the part of the disk to which the guest writes, bytes."""
DIRTY = (0, 500)
"""Dirty pages of the disk when the checkpoint begins, MiB, in addition to those of the guest's own writes."""
SETTLING = 3.0
"""Seconds that the guest writes before each checkpoint."""
NO_DISK = "no disk"
METHODS = (NO_DISK, "record", "snapshot", "copy")


class Writer(DebianGuest):
    """Guest whose fio writes 20 MB/s to `disk`, or to memory if `disk` is None."""

    load = ()

    def __init__(self, parts: GuestParts, folder: Path, name: str, disk: Path | None) -> None:
        super().__init__(parts, folder, machine.ROOT / ".cache", name)
        self.disks = {}
        self.disk = disk

    def devices(self, name: str) -> list[str]:
        words = ["-qmp", f"unix:{self.folder / name}.qmp,server=on,wait=off"]
        if self.disk is None:
            return words
        drive = f"file={self.disk},format=raw,if=none,id=data,cache=writeback"
        return [*words, "-drive", drive, "-device", "virtio-blk-pci,drive=data"]

    def begin(self) -> Monitor:
        """Boot the guest, start its writer, and pause the guest. Return its monitor."""
        self.boot()
        self.dialogue.ask("write /dev/vdb" if self.disk is not None else "write /tmp/file")
        self.hang_up()
        monitor = Monitor(self.folder / f"{self.name}.qmp")
        monitor.execute("stop")
        monitor.wait("STOP")
        return monitor


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure all methods, in turn."""
    runs = []
    with _guests(setting) as guests:
        for _ in range(1 if setting.quick else PAUSES):
            for method in METHODS:
                for extra in DIRTY[:1] if method == NO_DISK or setting.quick else DIRTY:
                    run = _pause(setting, guests, method, extra)
                    runs.append({"method": method, "dirty": f"{extra} MiB"} | run)
    return runs


@contextlib.contextmanager
def _guests(setting: Setting) -> Iterator[dict[bool, tuple[Writer, Monitor]]]:
    """Yield two paused guests with their monitors, by whether they have a writable disk."""
    parts = GuestParts(machine.QEMU, machine.KERNEL)
    with slow_disk(setting.folder / "slow", WRITTEN + (DIRTY[-1] << 20)) as disk, contextlib.ExitStack() as stack:
        guests = {}
        for writable in (False, True):
            folder = setting.folder / f"disk-{writable}"
            folder.mkdir()
            guest = Writer(parts, folder, folder.name.lower(), disk if writable else None)
            stack.callback(guest.end)
            guests[writable] = (guest, guest.begin())
        yield guests


def _pause(setting: Setting, guests: dict[bool, tuple[Writer, Monitor]], method: str, extra: int) -> dict[str, Any]:
    """Resume a guest, checkpoint it once, and pause it again. Return the figures."""
    guest, monitor = guests[method != NO_DISK]
    monitor.execute("cont")
    monitor.wait("RESUME")
    time.sleep(SETTLING)
    if guest.disk is not None:
        _make_dirty(guest.disk, extra)
    found = dirty()
    image, copies = setting.folder / "image", setting.folder / "copies"
    copies.mkdir()
    words = {"snapshot": ("--disks", "snapshot"), "copy": ("--disks", f"copy:{copies}")}.get(method, ())
    seen = len(monitor.history)
    process = pageferry("checkpoint", guest.name, str(image), "--output", "json", *words)
    figures = told_by(expect(process, "checkpoint"))
    reap(process)
    monitor.execute("query-status")  # the reply follows all earlier events
    happened = dict(monitor.history[seen:])
    image.unlink()
    shutil.rmtree(copies)
    if method == "snapshot":  # the next checkpoint then has the same disk, without an overlay
        subprocess.run([PAGEFERRY, "disks", "commit", guest.name], check=True, stdout=subprocess.DEVNULL)
    monitor.execute("stop")
    monitor.wait("STOP")
    pause = (happened["RESUME"] - happened["STOP"]) * 1e3
    return figures | {"pause-ms": pause, "dirty-mib": found / (1 << 20)}


def _make_dirty(disk: Path, mebibytes: int) -> None:
    """Flush the disk, then write to its pages in the page cache that the guest does not use."""
    with disk.open("r+b") as file:
        os.fdatasync(file.fileno())
        file.seek(WRITTEN)
        contents = os.urandom(1 << 20)
        for _ in range(mebibytes):
            file.write(contents)
