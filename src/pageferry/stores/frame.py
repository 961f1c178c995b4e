"""Frame of an image: all bytes of the image file that are not in a storage block.

These are the file header, the sections and the footer. The page map has 16 bytes for each page of memory, also for
pages that were never accessed. Chunks of zeros are therefore left out, so that the size of a manifest depends on what
the image stores, not on the size of the address space.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

from pageferry.errors import ImageError
from pageferry.host import files
from pageferry.stores.layout import Chunk

LENGTH = 1 << 20
"""Maximum length of a chunk, bytes."""
STEP = 64 << 10
"""Granularity with which zeros are left out, bytes."""
ALIGN = 4096
"""Alignment of sections in an image file, bytes."""
ENTRY = 16
"""Length of an entry of the page map, bytes."""
_ZEROS = bytes(STEP)
_LEVEL = 1
PLAIN, ZLIB, TRANSPOSED = 0, 1, 2


def encode(descriptor: int, blocks: list[tuple[int, int]], length: int) -> tuple[bytes, list[Chunk]]:
    """Read and compress the frame of an image file of `length` bytes. `blocks`: offset and length of each storage
    block. Raises OSError."""
    parts, chunks = [], []
    for start, end in _gaps(blocks, length):
        for offset, data in _data(descriptor, start, end):
            form, stored = _compressed(data)
            chunks.append(Chunk(offset, len(data), len(stored), form))
            parts.append(stored)
    return b"".join(parts), chunks


def write(descriptor: int, stored: memoryview, chunks: list[Chunk], length: int) -> None:
    """Write the frame into an empty file. Bytes that no chunk contains are holes. Raises ImageError, OSError."""
    at, end = 0, 0
    os.ftruncate(descriptor, length)
    for chunk in chunks:
        if chunk.offset < end or chunk.offset + chunk.length > length:
            raise ImageError("the chunks of the index overlap, or are not in the image file")
        data = _expanded(bytes(stored[at : at + chunk.stored]), chunk)
        if len(data) != chunk.length:
            raise ImageError(f"the chunk of the index at byte {chunk.offset} has {len(data)} bytes, not {chunk.length}")
        files.write_at(descriptor, data, chunk.offset)
        at, end = at + chunk.stored, chunk.offset + chunk.length


def _gaps(blocks: list[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges (start, end) of the file between storage blocks."""
    at = 0
    for offset, size in sorted(blocks):
        if offset > at:
            yield at, offset
        at = max(at, offset + size)
    if at < length:
        yield at, length


def _data(descriptor: int, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield offset and contents of the chunks of a range, without zeros at their beginning and end. Chunks are aligned,
    so that entries of the page map are not divided."""
    aligned = min(-(-start // ALIGN) * ALIGN, end)
    first = (start,) if start < aligned else ()
    for offset in (*first, *range(aligned, end, LENGTH)):
        data = os.pread(descriptor, (aligned if offset < aligned else min(offset + LENGTH, end)) - offset, offset)
        begin, stop = 0, len(data)
        while begin < stop and data.startswith(_ZEROS[: stop - begin], begin):
            begin += min(STEP, stop - begin)
        while begin < stop and data.endswith(_ZEROS[: stop - begin], begin, stop):
            stop -= min(STEP, stop - begin)
        if begin < stop:
            yield offset + begin, data[begin:stop]


def _compressed(data: bytes) -> tuple[int, bytes]:
    """Return the smallest form of a chunk. Page map entries compress better when transposed: this separates their
    signatures, which cannot be compressed, from their other fields."""
    found = [(PLAIN, data), (ZLIB, zlib.compress(data, _LEVEL))]
    if len(data) % ENTRY == 0:
        found.append((TRANSPOSED, zlib.compress(b"".join(data[at::ENTRY] for at in range(ENTRY)), _LEVEL)))
    return min(found, key=lambda form: len(form[1]))


def _expanded(stored: bytes, chunk: Chunk) -> bytes:
    """Return the contents of a chunk, at most one byte more than its length. Raises ImageError."""
    if chunk.form == PLAIN:
        return stored
    try:
        data = zlib.decompressobj().decompress(stored, chunk.length + 1)
    except zlib.error as error:
        raise ImageError(f"the chunk of the index at byte {chunk.offset} is invalid ({error})") from error
    if chunk.form == ZLIB or len(data) != chunk.length:
        return data
    if chunk.length % ENTRY:
        raise ImageError(f"the chunk of the index at byte {chunk.offset} does not consist of entries")
    entries, count = bytearray(chunk.length), chunk.length // ENTRY
    for at in range(ENTRY):
        entries[at::ENTRY] = data[at * count : (at + 1) * count]
    return bytes(entries)
