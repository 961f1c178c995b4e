"""Disks of test guests, and QEMU's locks on their files."""

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
_CLUSTER = 1 << 16
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
"""Header of a qcow2 file of version 3."""
_BACKING_FORMAT = 0xE2792ACA
"""Type of the extension that names the format of the backing file."""
_GET_LOCK, _SET_LOCK = 36, 37
"""F_OFD_GETLK and F_OFD_SETLK of fcntl(2), for open file description locks."""
_LOCK = struct.Struct("hhqqi4x")


def new_disk(path: Path) -> tuple[str, str]:
    """Create a raw disk of 1 MiB. Return the QEMU options that attach it."""
    path.write_bytes(bytes(1 << 20))
    return "-drive", f"file={path},format=raw,if=virtio,id=disk"


def raw(path: Path, size: int = 1 << 20) -> Path:
    """Create a raw disk of `size` bytes. Return its path."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def qcow2(path: Path, size: int = 1 << 20, backing: Path | None = None, backing_format: str = "raw") -> Path:
    """Create an empty qcow2 disk of `size` bytes, which is an overlay if `backing` is given. Return its path."""
    name, extensions = os.fsencode(backing or ""), b""
    if backing is not None:
        extensions = struct.pack(">II8s", _BACKING_FORMAT, len(backing_format), backing_format.encode())
    extensions += bytes(8)  # end of the extensions
    tables = (3 * _CLUSTER, _CLUSTER, 2 * _CLUSTER)
    start = _HEADER.size + len(extensions) if backing is not None else 0
    fields = (b"QFI\xfb", 3, start, len(name), 16, size, 0, 1, tables[0], tables[1], 1, 0, 0, 0, 0, 0, 4, 104)
    with path.open("wb") as file:
        file.write(_HEADER.pack(*fields) + extensions + name)
        file.truncate(4 * _CLUSTER)
        os.pwrite(file.fileno(), struct.pack(">Q", tables[2]), tables[1])
        os.pwrite(file.fileno(), struct.pack(">4H", 1, 1, 1, 1), tables[2])  # all clusters are in use
    return path


def drive(path: Path, name: str, *more: str, kind: str = "raw") -> tuple[str, str]:
    """Return the QEMU options that attach a disk in the format `kind`."""
    return "-drive", ",".join((f"file={path}", f"format={kind}", "if=virtio", f"id={name}", *more))


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lock a disk as a QEMU process that writes to the disk does."""
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
