"""Spool: the local file to which an image is written while an upload follows it.

The writer of an image appends storage blocks, and never changes what it has written, until it appends the index
(docs/format.md). The header of a storage block contains its length. A reader can therefore find each complete block
in the growing file. The space of blocks that were read is freed, so that the file contains only what the upload has
not read yet, and the index.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from logging import getLogger
from pathlib import Path

from pageferry._engine import Mapping
from pageferry.errors import CheckpointError
from pageferry.host import files
from pageferry.host.blocking import in_background
from pageferry.memory.regions import SMALL_PAGE
from pageferry.stores.sealing import Sealing
from pageferry.stores.sources import BATCH, Block, Extent, Lacks, read_blocks

log = getLogger(__name__)

FIRST_BLOCK = 4096
"""Offset of the first storage block, bytes."""
MAX_BLOCK = 8 << 20
RESERVE = 1 << 30
"""Space of the file system that a spool leaves free, bytes, unless `RESERVE_PART` is less."""
RESERVE_PART = 20
"""Part of the file system that a spool leaves free, if it is less than `RESERVE`: one in this number."""
_HEADER = struct.Struct("<4s8xHH8xI36x")
"""Header of a storage block: magic, number of runs, number of page blocks, bytes of the payload."""
_MAGIC = b"PFBK"


class Spool:
    """Empty unnamed file in a private directory. `limit`: maximum space that it occupies, bytes; 0 for no limit.

    Raises CheckpointError if the file cannot be created, or if the file system is almost full.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.where = f"the spool in {folder}"
        self.peak = 0
        """Maximum space that was occupied, bytes."""
        self._limit = limit
        self._end = FIRST_BLOCK
        """End of the blocks that were found."""
        self._freed = 0
        self._punches = True
        try:
            self.descriptor = files.unnamed_file(folder)
        except OSError as error:
            raise CheckpointError(
                f"cannot create {self.where}: {error.strerror}; set PAGEFERRY_CACHE_DIR to a directory of a file "
                "system with enough space"
            ) from error
        try:
            self.check_space()
        except CheckpointError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, which frees its space."""
        os.close(self.descriptor)

    def restart(self) -> None:
        """Empty the file for another writer. Raises OSError."""
        os.ftruncate(self.descriptor, 0)
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        self._end, self._freed = FIRST_BLOCK, 0

    def find(self) -> list[Extent]:
        """Return the extents of complete blocks that follow those found before, at most `BATCH` bytes of them."""
        found: list[Extent] = []
        size, begin = os.fstat(self.descriptor).st_size, self._end
        while self._end - begin < BATCH and self._end + _HEADER.size <= size:
            magic, runs, page_blocks, payload = _HEADER.unpack(os.pread(self.descriptor, _HEADER.size, self._end))
            length = _HEADER.size + 24 * runs + 16 * page_blocks + payload
            if magic != _MAGIC or length > MAX_BLOCK or self._end + length > size:
                break  # the index, or a block that is not complete yet
            found.append((self._end, length))
            self._end += length
        return found

    async def read(self, first: int, extents: Sequence[Extent], sealing: Sealing, lacks: Lacks) -> list[Block]:
        """Read storage blocks (see `sources.Reader`)."""
        return await in_background(lambda: read_blocks(self.descriptor, self.where, first, extents, sealing, lacks))

    def free(self, end: int) -> None:
        """Free the space of the file before offset `end`, without the first page. Whole pages only."""
        start, stop = max(self._freed, FIRST_BLOCK), end // SMALL_PAGE * SMALL_PAGE
        if not self._punches or stop <= start:
            return
        try:
            Mapping(self.descriptor, stop - start, start).discard(0, stop - start)
            self._freed = stop
        except OSError as error:
            self._punches = False
            log.warning("%s: it occupies space until the checkpoint ends: %s", self.where, error.strerror)

    def check_space(self) -> None:
        """Raise CheckpointError if the file is larger than the limit, or if its file system is almost full."""
        occupied = os.fstat(self.descriptor).st_blocks * 512
        self.peak = max(self.peak, occupied)
        if self._limit and occupied > self._limit:
            raise CheckpointError(
                f"cannot write {self.where}: the store is slower than the checkpoint, and the spool has reached its "
                f"limit of {self._limit} bytes; raise PAGEFERRY_SPOOL_SIZE, or limit the bandwidth of the checkpoint"
            )
        found = os.fstatvfs(self.descriptor)
        free, reserve = found.f_bavail * found.f_frsize, min(RESERVE, found.f_blocks * found.f_frsize // RESERVE_PART)
        if free < reserve:
            raise CheckpointError(
                f"cannot write {self.where}: its file system has less than {reserve} bytes left; free some space, set "
                "PAGEFERRY_CACHE_DIR to another file system, or limit the bandwidth of the checkpoint"
            )
