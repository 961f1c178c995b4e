"""Empty qcow2 files, written without QEMU: overlays of disks, copies, and the file for a device state.

QEMU is not running when the overlays of a restored guest are created, and `blockdev-create` would replace existing
files. The layout is that of qcow2 version 3, with numbers in big endian: a header with the name of the backing file, a
table of refcount blocks, one refcount block, and a level-1 table that contains only zeros, so that no cluster has
contents.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from pageferry.host import files

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
"""Size of a cluster, bytes."""
HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
"""Header: magic, version, backing file (offset, length), cluster bits, size, encryption, level-1 entries and offset,
refcount table (offset, clusters), snapshots (number, offset), features (incompatible, compatible, autoclear), refcount
order, header length."""
HEADER_BEGINNING = struct.Struct(">4sIQIIQIIQQIIQQ")
"""Header up to the incompatible features."""
MAGIC = b"QFI\xfb"

_EXTENSION = struct.Struct(">II")
"""Beginning of a header extension: type, length of its data."""
_BACKING_FORMAT = 0xE2792ACA
"""Type of the extension that names the format of the backing file."""
_END = _EXTENSION.pack(0, 0)
_COVERED = CLUSTER * CLUSTER // 8
"""Bytes of the disk that an entry of the level-1 table covers."""
MAX_BACKING_PATH = 1023
"""Maximum length of the name of a backing file, bytes."""


class Backing(NamedTuple):
    """Backing file of an overlay."""

    path: str
    format: str


def write_empty(file: int, size: int, backing: Backing | None = None) -> None:
    """Write an empty image for a disk of `size` bytes to an empty file. Raises OSError, for example if the file system
    is full.

    With `backing`, the image is an overlay with the contents of this file.
    """
    entries = -(-size // _COVERED)
    clusters = -(-8 * max(entries, 1) // CLUSTER)
    table, block, level1 = (number * CLUSTER for number in (1, 2, 3))
    extensions, name = _END, b""
    if backing is not None:
        name, kind = os.fsencode(backing.path), backing.format.encode()
        extensions = _EXTENSION.pack(_BACKING_FORMAT, len(kind)) + kind + bytes(-len(kind) % 8) + _END
    start = HEADER.size + len(extensions) if name else 0
    fields = (start, len(name), CLUSTER_BITS, size, 0, entries, level1, table, 1, 0, 0, 0, 0, 0, 4, HEADER.size)
    files.write_at(file, HEADER.pack(MAGIC, 3, *fields) + extensions + name, 0)
    files.write_at(file, struct.pack(">Q", block), table)
    files.write_at(file, struct.pack(f">{3 + clusters}H", *[1] * (3 + clusters)), block)  # all clusters are in use
    files.write_at(file, bytes(clusters * CLUSTER), level1)
