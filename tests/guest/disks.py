"""Disk that test guests share, and QEMU's locks on the file of the disk."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITES, _SHARES_NO_WRITES = 101, 201
"""Bytes of the disk file that QEMU locks for reading: the first while QEMU may write, the second while no other process
may write."""
_GET_LOCK, _SET_LOCK = 36, 37
"""F_OFD_GETLK and F_OFD_SETLK of fcntl(2), for open file description locks."""
_LOCK = struct.Struct("hhqqi4x")


def new_disk(path: Path) -> tuple[str, str]:
    """Create a raw disk of 1 MiB. Return the QEMU options that attach it."""
    path.write_bytes(bytes(1 << 20))
    return "-drive", f"file={path},format=raw,if=virtio,id=disk"


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lock a disk like a QEMU process that writes to it."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        for byte in (_WRITES, _SHARES_NO_WRITES):
            fcntl.fcntl(descriptor, _SET_LOCK, _LOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        yield
    finally:
        os.close(descriptor)


def locked(path: Path) -> bool:
    """Return whether a QEMU process has locked a disk as its only writer."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return all(_taken(descriptor, byte) for byte in (_WRITES, _SHARES_NO_WRITES))
    finally:
        os.close(descriptor)


def _taken(descriptor: int, byte: int) -> bool:
    asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    found: int = _LOCK.unpack(fcntl.fcntl(descriptor, _GET_LOCK, asked))[0]
    return found != fcntl.F_UNLCK
