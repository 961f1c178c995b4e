"""Debian guest: SQLite, Redis and fio work on a file system of the guest, and check their results on request.

The guest is booted once, checkpointed while its programs run, and restored from this image for each test. The disk with
the programs is read-only and shared by all guests. Each guest has a separate data disk. `debian.sh` is the init
of the guest, and describes the commands of its serial line.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pageferry
from pageferry.checkpoints.events import RestoreResult
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import booted, initrd
from tests.guest.machines import GuestParts
from tests.guest.serial import GuestFailed
from tests.guest.travel import Traveller

INIT = Path(__file__).with_name("debian.sh")
DISKS = {"data": 64 << 20}
"""Labels and sizes of the file systems to which the guest writes."""
IMAGE = "image"
REPLY = 300.0
"""Timeout of a command, seconds: programs of the guest run under TCG on a busy machine."""
_numbers = itertools.count(1)


class Dialogue:
    """Connection to the serial line of the guest."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(REPLY)
        self._socket.connect(str(path))
        self._received = b""

    def ready(self) -> None:
        """Wait until the guest has booted."""
        self._until(rb"READY")

    def ask(self, command: str) -> str:
        """Have the guest execute a command. Return the reply. Raises GuestFailed if a check has failed."""
        number = next(_numbers)
        self._socket.sendall(f"{number} {command}\n".encode())
        text = self._until(rb"REPLY %d (.*)\r?\n" % number)[1].decode(errors="replace").strip()
        if text.startswith("bad"):
            raise GuestFailed(text)
        return text

    def close(self) -> None:
        self._socket.close()

    def _until(self, pattern: bytes) -> re.Match[bytes]:
        while (found := re.search(pattern, self._received)) is None:
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                received = b""
            if not received or b"Kernel panic" in self._received:
                raise GuestFailed(f"the guest did not reply; its output ends with {self._received[-2000:]!r}")
            self._received += received
        self._received = self._received[found.end() :]
        return found


def amounts(text: str) -> dict[str, int]:
    """Return the numbers in a reply, such as `transfers=12`, by name."""
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", text)}


class DebianGuest(Traveller):
    """Debian guest that is migrated from one QEMU to the next.

    `source`: folder `.cache` of this tree. The data disks are in `folder`.
    """

    disks = DISKS
    load: tuple[str, ...] = ("load",)
    """Commands that start the programs."""
    check: tuple[str, ...] = ("check",)
    """Commands that check their results."""
    progress: tuple[str, ...] = ("transfers", "keys", "verified")
    """Amounts of work in the replies of these commands."""

    def __init__(self, parts: GuestParts, folder: Path, source: Path, name: str = "debian") -> None:
        super().__init__(parts, folder, name=name, memory="512M", checker=None)
        self.source = source
        self._dialogue: tuple[str, Dialogue] | None = None

    def command(self, name: str) -> list[str]:
        """Return the command line of QEMU for the guest `name`."""
        self.before(name)
        files = self.source / "debian"
        root = f"file={root_disk(files)},format=raw,if=none,id=root,readonly=on"
        words = ["-m", self.memory, "-serial", f"unix:{self._serial(name).path},server=on,wait=off"]
        words += ["-kernel", str(files / "vmlinuz"), "-initrd", str(build_initrd(files))]
        words += ["-append", "console=ttyS0 quiet no_timer_check mitigations=off"]
        words += ["-drive", root, "-device", "virtio-blk-pci,drive=root"]
        return self.parts.bare(*words, *self.devices(name))

    def before(self, name: str) -> None:
        """Prepare programs of the host that the QEMU for `name` requires."""

    def devices(self, name: str) -> list[str]:
        """Return the QEMU options of the devices that the kind of the guest determines."""
        drive = f"file={self.folder / 'data.raw'},format=raw,if=none,id=data"
        return ["-drive", drive, "-device", "virtio-blk-pci,drive=data"]

    def new_disks(self) -> None:
        """Create the disks to which the guest writes."""
        for label, size in self.disks.items():
            make_file_system(self.folder / f"{label}.raw", label, size)

    def boot(self) -> None:
        """Boot the guest on new disks, and start its programs."""
        self.new_disks()

        async def run() -> None:
            (await QemuWorkload.start(self.name, self.command(self.name))).close()

        asyncio.run(run())
        self.dialogue.ready()
        for command in self.load:
            self.dialogue.ask(command)

    def restore(self, saved: Path, **options: Any) -> RestoreResult:
        """Restore the guest from the folder `saved`, with copies of the disks that are in this folder."""
        for file in saved.glob("*.raw"):
            copy(file, self.folder / file.name)

        async def run() -> RestoreResult:
            how: dict[str, Any] = {"disks": "as-is", "resume": True} | options
            workload, result = await restore_guest(self.name, saved / IMAGE, self.command(self.name), **how)
            workload.close()
            return result

        return asyncio.run(run())

    def save(self, saved: Path, *, paused: bool = True, **options: Any) -> None:
        """Checkpoint the guest to the folder `saved`. `paused`: pause the guest for that, and copy its disks, too."""

        async def run() -> None:
            workload = await QemuWorkload.attach(self.name)
            try:
                await pageferry.checkpoint_async(workload, saved / IMAGE, **options)
            finally:
                workload.close()

        if not paused:
            asyncio.run(run())
            return
        self.qmp("stop")
        asyncio.run(run())
        for file in self.folder.glob("*.raw"):
            copy(file, saved / file.name)
        self.qmp("cont")

    @property
    def dialogue(self) -> Dialogue:
        """Connection to the serial line of the current QEMU."""
        if self._dialogue is None or self._dialogue[0] != self.name:
            self.hang_up()
            self._dialogue = (self.name, Dialogue(self._serial(self.name).path))
        return self._dialogue[1]

    def hang_up(self) -> None:
        """Close the connection to the serial line."""
        if self._dialogue is not None:
            self._dialogue[1].close()
            self._dialogue = None

    def verdict(self) -> dict[str, int]:
        """Have all programs of the guest check their results. Return the amounts of work since the start.

        Raises GuestFailed if a result is wrong.
        """
        return amounts(" ".join(self.dialogue.ask(command) for command in self.check))

    def works(self, before: dict[str, int], timeout: float = REPLY) -> dict[str, int]:
        """Check that all programs have done more work than `before`, and that their results are right."""
        deadline = time.monotonic() + timeout
        while True:
            after = self.verdict()
            if all(after[name] > before[name] for name in self.progress):
                return after
            assert time.monotonic() < deadline, f"a program makes no progress: {before}, {after}"

    def finish(self) -> None:
        """End the programs and the guest. Check the file systems on the disks with e2fsck(8)."""
        self.dialogue.ask("end")
        self.end()
        for label in self.disks:
            check_file_system(self.folder / f"{label}.raw")

    def end(self) -> None:
        self.hang_up()
        super().end()


def copy(source: Path, target: Path) -> None:
    """Copy a disk. Holes remain holes."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def make_file_system(path: Path, label: str, size: int, *options: str | Path) -> Path:
    """Create an ext4 file system in a file. Return the path."""
    path.unlink(missing_ok=True)
    command = ["mkfs.ext4", "-q", "-L", label, *options, path, f"{size >> 10}k"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def check_file_system(path: Path) -> None:
    """Check a file system without changing it. Raises GuestFailed if e2fsck finds an error."""
    done = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True)
    if done.returncode:
        raise GuestFailed(f"e2fsck exited with {done.returncode}: {done.stdout}")


def root_disk(files: Path) -> Path:
    """Return the disk with the programs of the guest, created from the directory `root` on the first call."""
    disk = files / "root.raw"
    if not disk.exists():
        temporary = disk.with_suffix(".new")
        with booted.locked(files / "root.lock"):
            if not disk.exists():
                make_file_system(temporary, "root", 256 << 20, "-O", "^has_journal", "-d", files / "root").rename(disk)
    return disk


def build_initrd(files: Path) -> Path:
    """Return the initrd, with `debian.sh` and the kernel modules."""
    image = files / "initrd"
    if not image.exists() or image.stat().st_mtime < INIT.stat().st_mtime:
        modules = [(path.name, path.read_bytes()) for path in sorted((files / "modules").iterdir())]
        busybox = ("bin/busybox", (files / "root/bin/busybox").read_bytes())
        initrd.write(image, initrd.archive(INIT.read_bytes(), modules, [busybox]))
    return image


def saved(guest: DebianGuest, states: Path) -> Path:
    """Return the folder with an image of a running guest and its disks.

    The first process of a test session that needs the image boots the guest. `guest.folder` is only used for that.
    """

    folder = states / f"{type(guest).__name__}-{guest.parts.qemu.parent.parent.name}"
    with booted.unsaved(folder) as temporary:
        if temporary is not None:
            _boot(guest, temporary)
    return folder


def _boot(guest: DebianGuest, folder: Path) -> None:
    try:
        guest.boot()
        guest.verdict()
        guest.save(folder)
    finally:
        guest.end()


@contextmanager
def running(guest: DebianGuest, saved: Path, **options: Any) -> Iterator[DebianGuest]:
    """Restore a guest from the folder `saved`; end it after the block."""
    try:
        guest.restore(saved, **options)
        yield guest
    finally:
        guest.end()


def missing() -> str | None:
    """Return the program of the host that is missing; None if there is none."""
    with contextlib.suppress(StopIteration):
        return next(name for name in ("mkfs.ext4", "e2fsck") if shutil.which(name) is None)
    return None
