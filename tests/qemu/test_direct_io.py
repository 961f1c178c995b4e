"""Tests of guests whose disk I/O bypasses page tables: migrations and checkpoints lose no read in flight."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import pageferry
from pageferry.checkpoints.events import CheckpointResult
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.migration import switchover_request
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import reader, travel
from tests.guest.machines import GuestParts
from tests.guest.travel import travelling
from tests.kernel import moving
from tests.kernel.programs import DEADLINE, Program, wait_until
from tests.slow_disk import HELD, SlowDisk, contents, slow_disk

pytestmark = pytest.mark.usefixtures("root")


class Reader:
    """Guest that reads from a slow disk on request. The requests and the guest's output pass through a socket."""

    def __init__(self, parts: GuestParts, folder: Path, disk: SlowDisk, options: str) -> None:
        self._parts = parts
        self._folder = folder
        self._disk = disk
        self._options = options
        self._lines: dict[str, socket.socket] = {}
        self._said: dict[str, str] = {}

    def command(self, name: str) -> list[str]:
        serial = ["-chardev", f"socket,id=s,path={self._path(name)},server=on,wait=off", "-serial", "chardev:s"]
        drive = f"file={self._disk.path},format=raw,if=none,id=disk,file.locking=off,{self._options}"
        disk = ["-drive", drive, "-device", "virtio-blk-pci,drive=disk,bootindex=0"]
        return self._parts.bare("-m", "64M", *serial, *disk)

    def start(self) -> None:
        words = ["run", "here", "--detach", "--", *self.command("here")]
        subprocess.run([sys.executable, "-m", "pageferry", *words], check=True, timeout=DEADLINE, capture_output=True)

    def receiver(self) -> Program:
        words = ["receive", "there", "--detach", "--output", "json", "--", *self.command("there")]
        return Program("-m", "pageferry", *words)

    def address_of(self, receiver: Program) -> str:
        """Return the address on which a receiver listens, and start to record the output of its guest."""
        address = moving.address_of(receiver)
        self._line("there")
        return address

    def reads(self, name: str = "here") -> None:
        """Have a guest read from its disk, and wait until the disk has received the request."""
        self.say(name, b"r")
        self._disk.held()

    def say(self, name: str, byte: bytes) -> None:
        self._line(name).sendall(byte)

    def waits_for(self, name: str, text: str) -> None:
        """Wait until a guest has printed this text."""

        def printed() -> bool:
            return text in self.said(name)

        wait_until(printed, f"{text!r} from {name}")

    def said(self, name: str) -> str:
        line = self._line(name)
        try:
            while data := line.recv(4096, socket.MSG_DONTWAIT):
                self._said[name] = self._said.get(name, "") + data.decode()
        except BlockingIOError:
            pass
        return self._said.get(name, "")

    def verify(self, name: str) -> str:
        """Have a guest check its read buffer.

        Return `fresh` if the buffer holds the contents of the disk, otherwise `stale`.
        """
        before = self.said(name).count("\n")
        self.say(name, b"v")
        wait_until(lambda: self.said(name).count("\n") > before, f"a result from {name}")
        return self.said(name).splitlines()[-1].split()[-1]

    def end(self) -> None:
        for line in self._lines.values():
            line.close()
        for name in list(Registry().entries()):
            subprocess.run([sys.executable, "-m", "pageferry", "stop", "--kill", name], check=True, timeout=DEADLINE)

    def _line(self, name: str) -> socket.socket:
        if name not in self._lines:
            self._lines[name] = socket.socket(socket.AF_UNIX)
            self._lines[name].connect(str(self._path(name)))
        return self._lines[name]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.serial"


OPTIONS = ["cache=none", "cache=none,aio=io_uring", "cache=none,aio=native", "cache=writeback"]
"""Options of QEMU's disk. The last one does not use O_DIRECT, but reads from the slow disk always pin the reader's
pages."""


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def reading(parts: GuestParts, tmp_path: Path, options: str) -> Iterator[tuple[Reader, SlowDisk]]:
    with slow_disk(tmp_path / "mounted", reader.boot_sector(tmp_path)) as disk:
        guest = Reader(parts, tmp_path, disk, options)
        try:
            guest.start()
            yield guest, disk
        finally:
            disk.delay(0)
            guest.end()


def migrate(address: str, *options: str, fault: str | None = None, **streams: Any) -> Program:
    return moving.migrating("here", address, *options, fault=fault, **streams)


def finish(migration: Program, there: Program) -> dict[str, Any]:
    result = moving.until(migration, "migration")
    assert migration.wait() == 0
    assert there.json()["type"] == "received"
    return result


def test_read_started_before_the_trace_is_not_lost(parts: GuestParts, tmp_path: Path, options: str) -> None:
    with reading(parts, tmp_path, options) as (guest, disk):
        guest.reads()
        with guest.receiver() as there, migrate(guest.address_of(there)) as migration:
            moving.until(migration, "setup")
            time.sleep(0.5)
            disk.answer()
            finish(migration, there)
            assert guest.verify("there") == "fresh"


def test_read_started_between_rounds_is_not_lost(parts: GuestParts, tmp_path: Path, options: str) -> None:
    with reading(parts, tmp_path, options) as (guest, disk), guest.receiver() as there:
        migration = migrate(guest.address_of(there), fault="source.between-rounds=stop")
        with migration:
            moving.until(migration, "setup")
            moving.stopped(migration)
            guest.reads()
            migration.process.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            disk.answer()
            result = finish(migration, there)
            assert guest.verify("there") == "fresh"
            assert result["direct-io"]["drains"] >= 2


def test_read_in_flight_at_the_switch_to_postcopy_is_not_lost(newest_parts: GuestParts, tmp_path: Path) -> None:
    with reading(newest_parts, tmp_path, "cache=none") as (guest, disk), guest.receiver() as there:
        options = ("--mode", "hybrid", "--max-downtime", "0")
        fault = "source.between-rounds=stop"
        with migrate(guest.address_of(there), *options, fault=fault) as migration:
            moving.until(migration, "setup")
            moving.stopped(migration)
            guest.reads()  # the first collection marks the pages of the read, and round 2 sends them
            migration.process.send_signal(signal.SIGCONT)
            moving.until(migration, "round")
            time.sleep(0.5)
            switchover_request.request(Registry().folder("here"))
            disk.answer()
            finish(migration, there)
            assert guest.verify("there") == "fresh"


IMPATIENT = """
import sys
from pageferry.workloads import direct_io
direct_io.DRAIN_TIMEOUT = 2.0
from pageferry.cli.main import main
sys.exit(main())
"""
"""Program that waits 2 s, instead of 10 s, for requests in flight."""


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_migration_fails_and_names_a_disk_that_does_not_reply(
    newest_parts: GuestParts, tmp_path: Path, seen: bool
) -> None:
    """Other processes cannot see io_uring requests, so the source pauses the guest to wait for them.

    After the failed migration, a guardian resumes the guest.
    """
    with reading(newest_parts, tmp_path, "cache=none" if seen else "cache=none,aio=io_uring") as (guest, disk):
        guest.reads()
        with guest.receiver() as there:
            command = ("migrate", "here", guest.address_of(there), "--output", "json")
            with Program("-c", IMPATIENT, *command, stderr=subprocess.PIPE) as migration:
                assert migration.wait() == 10
                assert migration.process.stderr is not None
                words = migration.process.stderr.read().decode()
                migration.process.stderr.close()
            assert f"a request to {disk.path} has been in flight for more than 2 s" in words
            assert there.wait() != 0
        if seen:  # the source can see this request, so it has not paused the guest
            assert travel.listed()["here"] == "running"
        disk.answer()
        guest.waits_for("here", "fresh")
        wait_until(lambda: travel.listed()["here"] == "running", "the guest to run")


def test_checkpoint_in_rounds_contains_a_read_in_flight(newest_parts: GuestParts, tmp_path: Path) -> None:
    with reading(newest_parts, tmp_path, "cache=none") as (guest, disk):
        assert saved(tmp_path / "0", track=True).tracked
        guest.reads()
        timer = threading.Timer(0.5, disk.answer)
        timer.start()
        result = saved(tmp_path / "1", parent=tmp_path / "0", at_snapshot_point=5 * 4096)
        timer.join()
        assert (result.tracking, result.tracked) == ("trace", True), result.tracking_note
        assert result.rounds >= 1
        pages = ImageFile(tmp_path / "1").read(reader.BUFFER // 4096, reader.LENGTH // 4096)
        assert pages == contents(HELD, reader.LENGTH)
        assert result.drains >= 1


def saved(path: Path, **options: Any) -> CheckpointResult:
    async def save() -> CheckpointResult:
        guest = await QemuWorkload.attach("here")
        try:
            return await pageferry.checkpoint_async(guest, path, **options)
        finally:
            guest.close()

    return asyncio.run(save())


def test_guest_without_direct_io_is_never_drained(newest_parts: GuestParts, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(8 << 20))
    drive = f"file={image},format=raw,if=none,id=disk,cache=writeback"
    options = ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]
    with travelling(newest_parts, Path("/dev/shm"), *options, checker=None) as guest:
        assert guest.move()["direct-io"] == {"drains": 0, "time": 0.0, "longest": 0.0, "pinned-pages": 0}
