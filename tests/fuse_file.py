"""FUSE file system with one file; a subclass of `Server` handles its reads and writes (fuse(4), protocol 7.31)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Final

from tests.kernel.programs import Program

SECTOR: Final = 512
NAME: Final = "disk"
MAX_REQUEST: Final = 1 << 20
"""Maximum number of bytes that one request reads or writes."""
DIRECT_IO: Final = 1
"""Flag of an open file: no page cache."""
ASYNC_DIO: Final = 1 << 15
"""Flag of a session: several direct requests in flight."""
MAX_PAGES: Final = 1 << 22
"""Flag of a session: the reply contains the maximum size of requests."""
_ROOT, _FILE = 1, 2
_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


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


class Server(ABC):
    """Server of the file system. `size`: size of its file, bytes."""

    session_flags = 0
    open_flags = 0

    def __init__(self, device: int, size: int) -> None:
        self._device = device
        self._size = size

    @abstractmethod
    def read(self, unique: int, offset: int, length: int) -> None:
        """Reply to a read with `reply`, at once or later."""

    @abstractmethod
    def write(self, unique: int, offset: int, data: bytes) -> None:
        """Reply to a write with `written`, at once or later."""

    def serve(self) -> None:
        """Serve requests until the file system is unmounted."""
        while True:
            try:
                message = os.read(self._device, MAX_REQUEST + 4096)
            except OSError as failed:
                if failed.errno == errno.ENODEV:  # unmounted
                    return
                continue
            _, opcode, unique, node = struct.unpack_from("<IIQQ", message)
            if opcode not in (_Op.FORGET, _Op.FORGET_MANY, _Op.INTERRUPT):
                self._handle(opcode, unique, node, message[40:])

    def reply(self, unique: int, data: bytes = b"", error: int = 0) -> None:
        """Reply to a request."""
        with contextlib.suppress(OSError):  # the reader has been killed
            os.write(self._device, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)

    def written(self, unique: int, length: int) -> None:
        """Reply to a write of `length` bytes."""
        self.reply(unique, struct.pack("<II", length, 0))

    def _handle(self, opcode: int, unique: int, node: int, body: bytes) -> None:
        match opcode:
            case _Op.INIT:
                limits = struct.pack("<HHIIHHI7I", 16, 12, MAX_REQUEST, 1, 256, 0, 0, *[0] * 7)
                self.reply(unique, struct.pack("<IIII", 7, 31, 0, self.session_flags) + limits)
            case _Op.LOOKUP if body.rstrip(b"\0") == NAME.encode():
                self.reply(unique, struct.pack("<QQQQII", _FILE, 0, 60, 60, 0, 0) + self._attributes(_FILE))
            case _Op.LOOKUP:
                self.reply(unique, error=errno.ENOENT)
            case _Op.GETATTR | _Op.SETATTR:
                self.reply(unique, struct.pack("<QII", 60, 0, 0) + self._attributes(node))
            case _Op.OPEN | _Op.OPENDIR:
                self.reply(unique, struct.pack("<QII", 1, self.open_flags, 0))
            case _Op.READ:
                self.read(unique, *struct.unpack_from("<QQI", body)[1:])
            case _Op.WRITE:
                _, offset, length = struct.unpack_from("<QQI", body)
                self.write(unique, offset, body[40 : 40 + length])
            case _Op.STATFS:
                self.reply(unique, struct.pack("<5QIII", 0, 0, 0, 0, 0, 4096, 255, 4096) + bytes(28))
            case _Op.RELEASE | _Op.FSYNC | _Op.FLUSH | _Op.RELEASEDIR | _Op.DESTROY:
                self.reply(unique)
            case _:
                self.reply(unique, error=errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        mode, size = (0o40755, 0) if node == _ROOT else (0o100666, self._size)
        return struct.pack("<6Q10I", node, size, size // SECTOR, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


@contextmanager
def mounted(folder: Path, module: str, *words: str) -> Iterator[Program | str]:
    """Create `folder`, and run `module`, which mounts its file system there. Yield the process, or the error as text.

    `words`: arguments of the module after the folder.
    """
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield "no /dev/fuse"
        return
    folder.mkdir()
    with Program("-m", module, str(folder), *words) as program:
        if (said := program.line()) != "mounted":
            yield f"cannot mount a FUSE file system: {said}"
            return
        try:
            yield program
        finally:
            program.kill()  # pending requests then fail, so no process keeps waiting for the disk
            _libc.umount2(os.fsencode(folder), _MNT_DETACH)


def mount(folder: str) -> int | None:
    """Mount a file system on `folder`. Return the device of its server, or None after printing the error."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,max_read={MAX_REQUEST}"
    if _libc.mount(b"slow", os.fsencode(folder), b"fuse", 0, options.encode()):
        print(os.strerror(ctypes.get_errno()), flush=True)
        return None
    return device


def run(server: Server, *background: threading.Thread) -> None:
    """Report that the file system is mounted, and serve it until it is unmounted."""
    for thread in background:
        thread.start()
    print("mounted", flush=True)
    server.serve()
