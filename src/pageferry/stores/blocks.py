"""Storage blocks of an image in a store: normal form, digests, and the table that locates them.

The header of a storage block contains its number in the file. Blocks with the same contents at different positions
would therefore differ. In a pack, the number and the checksum of the header are zero, and the table contains them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from pageferry.errors import ImageError
from pageferry.stores.sealing import PLAIN, TAG, BlockOpener

RECORD = struct.Struct("<32s8sQIIII")
"""Entry of the table, 64 bytes: digest, header checksum, offset in the image file, length, index of the pack, offset in
the pack, flags."""
NORMAL = 1
"""Flag: the number and the checksum of the header are zero in the pack."""
SEALED = 2
"""Flag: the block is encrypted in the pack."""
HEADER = 64
"""Length of the header of a storage block, bytes."""
MAX_BLOCK = 8 << 20
"""Upper bound of the length of a storage block, bytes; the image format has a lower one."""
MAGIC = b"PFBK"
"""First bytes of the header."""
MAX_BLOCKS = 1 << 22
"""Maximum number of storage blocks of an image, and of a chain: 4 TiB of memory in blocks of 1 MiB. A table of this
size takes about 1.5 GiB of memory."""
MAX_RATIO = 16
"""Maximum ratio of the size of a table to its compressed size. Digests cannot be compressed, so that it is below 2,
unless many blocks are equal."""
_NUMBER = slice(32, 40)
CHECKSUM = slice(56, 64)
"""Checksum in the header."""
_LEVEL = 1


class BlockRecord(NamedTuple):
    """Storage block of an image."""

    digest: bytes
    """Content address of the block in its normal form: its digest, keyed if the image is encrypted."""
    checksum: bytes
    """Checksum in the header of the block in the image file."""
    offset: int
    """Offset in the image file, bytes."""
    length: int
    """Length in the image file, bytes."""
    pack: int
    """Index in the list of packs."""
    start: int
    """Offset in the pack, bytes."""
    flags: int

    @property
    def stored(self) -> int:
        """Length in the pack, bytes."""
        return self.length + (TAG if self.flags & SEALED else 0)


def normalize(block: bytearray, number: int) -> tuple[bytes, int]:
    """Bring a block into its normal form, in place. Return the checksum of its header, and its flags. A block whose
    header contains another number is left as it is."""
    checksum = bytes(block[CHECKSUM])
    if len(block) < HEADER or block[_NUMBER] != number.to_bytes(8, "little"):
        return checksum, 0
    block[_NUMBER] = block[CHECKSUM] = bytes(8)
    return checksum, NORMAL


def restore(stored: memoryview, record: BlockRecord, number: int, sealing: BlockOpener = PLAIN) -> bytearray:
    """Verify and decrypt a block of a pack, and return it as it is in the image file. `sealing`: that of the image.

    Raises ImageError.
    """
    block = sealing.open_block(stored, record.digest) if len(stored) == record.stored else None
    if block is None:
        raise ImageError(f"storage block {number} does not match its digest")
    if record.flags & NORMAL:
        block[_NUMBER] = number.to_bytes(8, "little")
        block[CHECKSUM] = record.checksum
    return block


def check_count(count: int, stored: int) -> None:
    """Raise ImageError if a table of `stored` compressed bytes cannot have `count` blocks, or if these are too many to
    be read into memory."""
    if count > MAX_BLOCKS:
        raise ImageError(f"it has {count} storage blocks, expected at most {MAX_BLOCKS}")
    if count * RECORD.size > MAX_RATIO * (stored + RECORD.size):
        raise ImageError(f"the table of {count} storage blocks has only {stored} bytes")


def encode_table(records: list[BlockRecord]) -> bytes:
    """Return the compressed table."""
    compressor = zlib.compressobj(_LEVEL)
    parts = [compressor.compress(RECORD.pack(*record)) for record in records]
    return b"".join((*parts, compressor.flush()))


def decode_table(stored: memoryview, count: int, packs: list[int], length: int, sealed: int = 0) -> list[BlockRecord]:
    """Parse the table of `count` blocks. `packs`: lengths of the packs; `length`: size of the image file, bytes;
    `sealed`: `SEALED` if the image is encrypted, otherwise 0.

    Raises ImageError unless the blocks are in their packs, and in the file one after the other.
    """
    found: list[BlockRecord] = []
    end = 0
    for record in _records(stored, count):
        if record.offset < end or not HEADER <= record.length <= MAX_BLOCK or record.offset + record.length > length:
            raise ImageError(f"the table of storage blocks is invalid at block {len(found)}")
        if record.flags & ~NORMAL != sealed:
            raise ImageError(f"storage block {len(found)} has the unknown flags {record.flags:#x}")
        if record.pack >= len(packs) or record.start + record.stored > packs[record.pack]:
            raise ImageError(f"storage block {len(found)} is not in a pack")
        end = record.offset + record.length
        found.append(record)
    return found


def _records(stored: memoryview, count: int) -> Iterator[BlockRecord]:
    """Decompress the table step by step, so that its size is checked before memory is allocated."""
    expander = zlib.decompressobj()
    pending, left = bytes(stored), count * RECORD.size
    rest = b""
    try:
        while left:
            piece = expander.decompress(pending, min(left, 1 << 20))
            pending, left = expander.unconsumed_tail, left - len(piece)
            if not piece:
                raise ImageError("the table of storage blocks is truncated")
            rest += piece
            whole = len(rest) - len(rest) % RECORD.size
            yield from map(BlockRecord._make, RECORD.iter_unpack(rest[:whole]))
            rest = rest[whole:]
    except zlib.error as error:
        raise ImageError(f"the table of storage blocks is invalid ({error})") from error
