"""Disk that completes reads on request: a FUSE file system with one file, read without the page cache.

The kernel pins the pages of a reader while its request is in flight, as it does for `O_DIRECT` on any disk. Reads at
offsets below `HELD` complete immediately. All other reads are held, and the process prints `held OFFSET LENGTH` for
each. Commands on standard input:

- `answer`: complete all held reads
- `delay SECONDS`: complete all held reads, and each later read after SECONDS
- `hold`: hold later reads again
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Final

import pytest

from tests.kernel.programs import Program

SIZE: Final = 8 << 20
HELD: Final = 1 << 20
"""Offset from which on reads are held, bytes."""
SECTOR: Final = 512
NAME: Final = "disk"


class _Op(IntEnum):
    """Opcodes of FUSE requests."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    FORGET_MANY = 42


_DIRECT_IO: Final = 1
_ASYNC_DIO: Final = 1 << 15
_ROOT, _FILE = 1, 2
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def contents(offset: int, length: int) -> bytes:
    """Return the contents of a range of the disk. Each 16-byte record contains the number of its sector."""
    first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
    data = b"".join(b"disk%012x" % sector * (SECTOR // 16) for sector in range(first, last))
    return data[offset - first * SECTOR :][:length]


class SlowDisk:
    """Slow disk, served by a separate process."""

    def __init__(self, folder: Path, program: Program) -> None:
        self.path = folder / NAME
        self._program = program

    def held(self) -> tuple[int, int]:
        """Wait for the next held read; return its offset and length."""
        word, offset, length = self._program.line().split()
        assert word == "held"
        return int(offset), int(length)

    def answer(self) -> None:
        """Complete all held reads."""
        self._program.say("answer")

    def delay(self, seconds: float) -> None:
        """Complete all held reads, and each later read after `seconds`."""
        self._program.say(f"delay {seconds}")

    def hold(self) -> None:
        """Hold all later reads."""
        self._program.say("hold")


@contextmanager
def slow_disk(folder: Path, boot_sector: bytes = b"") -> Iterator[SlowDisk]:
    """Create `folder`, mount the disk on it, and yield the disk.

    The disk begins with `boot_sector`. Skip the test if FUSE is not available.
    """
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    folder.mkdir()
    (folder.parent / "boot").write_bytes(boot_sector)
    with Program("-m", "tests.slow_disk", str(folder), str(folder.parent / "boot")) as program:
        if (said := program.line()) != "mounted":
            pytest.skip(f"cannot mount a FUSE file system: {said}")
        try:
            yield SlowDisk(folder, program)
        finally:
            program.kill()  # pending requests then fail, so no process keeps waiting for the disk
            _libc.umount2(os.fsencode(folder), _MNT_DETACH)


class _Server:
    def __init__(self, device: int, boot_sector: bytes) -> None:
        self._device = device
        self._boot = boot_sector
        self._lock = threading.Lock()
        self._held: list[tuple[int, int, int]] = []
        self._delay: float | None = None

    def serve(self) -> None:
        while True:
            try:
                message = os.read(self._device, (1 << 20) + 4096)
            except OSError as failed:
                if failed.errno == errno.ENODEV:  # unmounted
                    return
                continue
            _, opcode, unique, node = struct.unpack_from("<IIQQ", message)
            if opcode not in (_Op.FORGET, _Op.FORGET_MANY, _Op.INTERRUPT):
                self._handle(opcode, unique, node, message[40:])

    def obey(self) -> None:
        for line in sys.stdin:
            match line.split():
                case ["answer"]:
                    self._answer_all()
                case ["delay", seconds]:
                    self._delay = float(seconds)
                    self._answer_all()
                case ["hold"]:
                    self._delay = None

    def _handle(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        match opcode:
            case _Op.INIT:
                limits = struct.pack("<HHIIHHI7I", 16, 12, 1 << 20, 1, 256, 0, 0, *[0] * 7)
                self._reply(unique, struct.pack("<IIII", 7, 31, 0, _ASYNC_DIO) + limits)
            case _Op.LOOKUP if body.rstrip(b"\0") == NAME.encode():
                self._reply(unique, struct.pack("<QQQQII", _FILE, 0, 60, 60, 0, 0) + _attributes(_FILE))
            case _Op.LOOKUP:
                self._reply(unique, error=errno.ENOENT)
            case _Op.GETATTR | _Op.SETATTR:
                self._reply(unique, struct.pack("<QII", 60, 0, 0) + _attributes(node))
            case _Op.OPEN | _Op.OPENDIR:
                self._reply(unique, struct.pack("<QII", 1, _DIRECT_IO, 0))
            case _Op.READ:
                self._read(unique, *struct.unpack_from("<QQI", body)[1:])
            case _Op.WRITE:
                self._reply(unique, struct.pack("<II", struct.unpack_from("<QQI", body)[2], 0))
            case _Op.STATFS:
                self._reply(unique, struct.pack("<5QIII", 0, 0, 0, 0, 0, 4096, 255, 4096) + bytes(28))
            case _Op.RELEASE | _Op.FSYNC | _Op.FLUSH | _Op.RELEASEDIR | _Op.DESTROY:
                self._reply(unique)
            case _:
                self._reply(unique, error=errno.ENOSYS)

    def _read(self, unique: int, offset: int, length: int) -> None:
        length = max(0, min(length, SIZE - offset))
        if offset < HELD:
            self._reply(unique, (self._boot + contents(len(self._boot), HELD))[offset:][:length])
            return
        if self._delay is not None:
            threading.Timer(self._delay, self._answer, (unique, offset, length)).start()
            return
        with self._lock:
            self._held.append((unique, offset, length))
        print("held", offset, length, flush=True)

    def _answer_all(self) -> None:
        with self._lock:
            held, self._held = self._held, []
        for request in held:
            self._answer(*request)

    def _answer(self, unique: int, offset: int, length: int) -> None:
        self._reply(unique, contents(offset, length))

    def _reply(self, unique: int, data: bytes = b"", error: int = 0) -> None:
        with contextlib.suppress(OSError):  # the reader has been killed
            os.write(self._device, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)


def _attributes(node: int) -> bytes:
    mode, size = (0o40755, 0) if node == _ROOT else (0o100666, SIZE)
    return struct.pack("<6Q10I", node, size, size // SECTOR, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def main(folder: str, boot: str) -> None:
    """Mount the disk on `folder`, and serve it until it is unmounted. `boot`: path of the boot sector."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={1 << 20}"
    if _libc.mount(b"slow", os.fsencode(folder), b"fuse", 0, options.encode()):
        print(os.strerror(ctypes.get_errno()), flush=True)
        return
    server = _Server(device, Path(boot).read_bytes())
    threading.Thread(target=server.obey, daemon=True).start()
    print("mounted", flush=True)
    server.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
