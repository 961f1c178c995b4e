"""Directory of the arrays in an arena, which is valid at every moment.

The first page of the arena is the header: a magic number, the size of the arena and the *root*, the offset of the
current directory. A directory is never modified. A change writes a new directory into free memory, and then stores the
offset of this directory in the root with one aligned store of 8 bytes. A copy of the memory at any moment, such as a
checkpoint or the memory of a killed program, therefore contains the directory before or after the change. The memory of
the old directory and of deleted arrays is reused only by later changes. All fields are untrusted when an arena is
opened.

Another process may read a directory while its memory is reused, and a later directory may be at the same offset. A
*version* therefore consists of the root, and of the length and checksum of the directory at that offset.
"""

from __future__ import annotations

import math
import time
import zlib
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from pageferry.errors import ImageError, UsageError
from pageferry.memory.regions import SMALL_PAGE
from pageferry.objects import dtypes

MAGIC = b"PFARRAY1"
HEADER = SMALL_PAGE
"""Length of the header, bytes."""
ALIGNMENT = 64
"""Alignment of directories, and of arrays that are shorter than a page, bytes."""
MAX_DIRECTORY = 256 << 20
MAX_ARRAYS = 1 << 20
MAX_NAME = 1024
_SIZE_AT, _ROOT_AT = 1, 2
"""Positions of the fields in the header, in units of 8 bytes."""
_PREFIX = 16
"""Bytes before a directory: its length and its CRC-32, 8 bytes each."""

ATTEMPTS = 5
"""Number of consecutive reads that must find the same version damaged: its memory may be reused during a read."""
PAUSE = 0.001
"""Time between these reads, seconds."""

MAX_SPAN = (1 << 63) - 1
"""Maximum length of an array in bytes, computed as if each axis without elements had one: numpy refuses longer arrays,
even without elements."""

Length = Annotated[int, Meta(ge=0, le=1 << 46)]


class Version(NamedTuple):
    """Version of the directory."""

    root: int
    """Offset of the directory; 0 before the first array is added."""
    prefix: bytes
    """Length and checksum of the directory, as stored."""


EMPTY = Version(0, b"")


class ArrayInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Array in an arena, in C order."""

    offset: Length
    """Offset in the arena, bytes."""
    capacity: Length
    """Length in bytes of the extent of the array, which is at least the length of the array."""
    dtype: Annotated[str, Meta(min_length=1, max_length=65536)]
    """Type of the elements (see `dtypes`)."""
    shape: Annotated[tuple[Length, ...], Meta(max_length=64)]


Entries = dict[str, ArrayInfo]

_decoder = msgspec.msgpack.Decoder(dict[Annotated[str, Meta(max_length=MAX_NAME)], ArrayInfo])


class DirectoryView:
    """Directory in the memory of an arena."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._words = memory[:HEADER].cast("Q")

    @property
    def length(self) -> int:
        """Length of the memory of the arena when this object was created, bytes."""
        return len(self._memory)

    def format(self) -> None:
        """Write the header of an empty arena, whose directory is empty. The magic number is written last."""
        self._words[_SIZE_AT] = len(self._memory)
        self._words[_ROOT_AT] = 0
        self._memory[: len(MAGIC)] = MAGIC

    def check(self) -> None:
        """Raise UsageError unless the arena contains arrays and has at least its original size."""
        if bytes(self._memory[: len(MAGIC)]) != MAGIC or not 0 < self._words[_SIZE_AT] <= len(self._memory):
            raise UsageError(
                "cannot open the arrays of an arena: it has no directory of arrays; use an arena, image or name of a "
                "`pageferry.Arrays`"
            )

    @property
    def root(self) -> int:
        """Offset of the current directory; 0 before the first array is added."""
        return self._words[_ROOT_AT]

    def version(self) -> Version:
        """Return the current version. Its fields are not checked."""
        root = self.root
        return Version(root, bytes(self._memory[root : root + _PREFIX])) if root else EMPTY

    def publish(self, root: int) -> None:
        """Make the directory at `root` the current one. Only this store changes which arrays exist."""
        self._words[_ROOT_AT] = root

    def write(self, root: int, encoded: bytes) -> Version:
        """Write an encoded directory into free memory, and return its version."""
        prefix = len(encoded).to_bytes(8, "little") + zlib.crc32(encoded).to_bytes(8, "little")
        self._memory[root : root + _PREFIX] = prefix
        self._memory[root + _PREFIX : root + _PREFIX + len(encoded)] = encoded
        return Version(root, prefix)

    def latest(self) -> tuple[Version, Entries, int]:
        """Return the current version, its directory, and the length of its extent, while another process may change the
        directory. Raises ImageError if the directory is damaged."""
        attempts, damaged = 0, None
        while True:
            version = self.version()
            try:
                return version, *self.read(version)
            except ImageError:
                attempts = attempts + 1 if version == damaged else 1
                if attempts == ATTEMPTS:
                    raise
                damaged = version
                time.sleep(PAUSE)

    def read(self, version: Version) -> tuple[Entries, int]:
        """Return the directory of a version, and the length of its extent. Raises ImageError if the directory is
        damaged."""
        root, prefix = version
        if root == 0:
            return {}, 0
        if not HEADER <= root <= len(self._memory) - _PREFIX or root % ALIGNMENT:
            raise _damaged(f"its root is {root}")
        length = int.from_bytes(prefix[:8], "little")
        if length > min(MAX_DIRECTORY, len(self._memory) - root - _PREFIX):
            raise _damaged(f"its directory has {length} bytes")
        encoded = bytes(self._memory[root + _PREFIX : root + _PREFIX + length])
        if zlib.crc32(encoded) != int.from_bytes(prefix[8:], "little"):
            raise _damaged("the checksum of its directory is wrong")
        try:
            entries = _decoder.decode(encoded)
            for name, info in entries.items():
                _check(name, info, len(self._memory))
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            raise _damaged(str(error)) from error
        return entries, extent_length(length)


def encode(entries: Entries) -> bytes:
    """Return an encoded directory. Raises UsageError if it is too large."""
    encoded = msgspec.msgpack.encode(entries)
    if len(entries) > MAX_ARRAYS or len(encoded) > MAX_DIRECTORY:
        raise UsageError(f"cannot store {len(entries)} arrays: the limit is {MAX_ARRAYS}; use fewer, larger arrays")
    return encoded


def extent_length(encoded: int) -> int:
    """Return the length of the extent for an encoded directory of `encoded` bytes."""
    return _rounded(_PREFIX + encoded, ALIGNMENT)


def array_extent(nbytes: int) -> tuple[int, int]:
    """Return length and alignment of the extent for an array of `nbytes` bytes."""
    alignment = SMALL_PAGE if nbytes >= SMALL_PAGE else ALIGNMENT
    return _rounded(max(nbytes, 1), alignment), alignment


def _check(name: str, info: ArrayInfo, size: int) -> None:
    """Raise ValueError unless the extent lies in the arena, and the array in its extent."""
    if info.offset < HEADER or info.offset % ALIGNMENT or info.capacity % ALIGNMENT or not info.capacity:
        raise ValueError(f"invalid extent of array {name!r}: {info.capacity} bytes at {info.offset}")
    if info.offset + info.capacity > size:
        raise ValueError(f"invalid extent of array {name!r}: it ends after the arena of {size} bytes")
    itemsize = int(dtypes.from_text(info.dtype).itemsize)
    if math.prod(info.shape) * itemsize > info.capacity:
        raise ValueError(f"invalid shape {info.shape} of array {name!r}: its extent has {info.capacity} bytes")
    if math.prod(one for one in info.shape if one) * max(itemsize, 1) > MAX_SPAN:
        raise ValueError(f"invalid shape {info.shape} of array {name!r}: the dimensions are too large")


def _damaged(cause: str) -> ImageError:
    return ImageError(f"cannot open the arrays of an arena: {cause}; use another checkpoint")


def _rounded(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment
