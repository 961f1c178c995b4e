"""Images that an upload reads: a file, a file that is still being written, or an image of another store.

The upload is the same for all of them (`push`): it reads storage blocks in their normal form, in the order of the file,
and then the frame.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pageferry.errors import ImageError, WrongKey
from pageferry.host.blocking import in_thread, on_thread
from pageferry.images.image import ImageFile, Link
from pageferry.images.metadata import ImageIdentity
from pageferry.stores import blocks, entry, frame
from pageferry.stores.keys import Access
from pageferry.stores.layout import Chunk
from pageferry.stores.sealing import Sealing

BATCH = 16 << 20
"""Bytes of storage blocks that are read at once."""

Extent = tuple[int, int]
"""Offset and length of a storage block in the image file, bytes."""
Lacks = Callable[[bytes], bool]
"""Function that returns whether an upload lacks the storage block with a content address."""


@dataclass(slots=True)
class Block:
    """Storage block of an upload."""

    stored: bytes | bytearray
    """Contents as they are written to a pack."""
    digest: bytes
    """Content address, keyed if the upload is encrypted."""
    checksum: bytes
    flags: int


@dataclass(frozen=True, slots=True)
class About:
    """Description of an image for its reference."""

    kind: str
    workload: str
    created: float
    """Time of the snapshot point, seconds since 1970."""


class Reader(Protocol):
    """Reader of storage blocks, in the order of the file."""

    async def read(self, first: int, extents: Sequence[Extent], sealing: Sealing, lacks: Lacks) -> list[Block]:
        """Read consecutive storage blocks, the first of which has the number `first`. `sealing`: that of the upload.
        The contents of blocks that the upload does not lack may be missing. Raises ImageError, StoreError."""


class Source(Reader, Protocol):
    """Image to upload."""

    @property
    def where(self) -> str:
        """Path or URL, for messages."""

    @property
    def identity(self) -> ImageIdentity:
        """Identity of the image."""

    @property
    def about(self) -> About:
        """Description for the reference."""

    @property
    def extents(self) -> list[Extent]:
        """Extents of all storage blocks, in the order of the file."""

    @property
    def length(self) -> int:
        """Size of the image file, bytes."""

    @property
    def parent_name(self) -> str:
        """Name of the file in which the image expects its parent."""

    async def check(self) -> None:
        """Verify the image before anything is uploaded. Raises ImageError if it is damaged."""

    async def frame(self) -> tuple[bytes, list[Chunk]]:
        """Return the compressed frame and its chunks. Raises ImageError, StoreError."""


class FileSource:
    """Complete image file: image `number` of a chain."""

    def __init__(self, image: ImageFile, number: int) -> None:
        self._image = image
        self._number = number
        self._link = image.links[number]
        self.where = str(self._link.path)
        self.identity = self._link.identity
        self.about = about_of(self._link)
        self.extents = self._link.image.blocks
        self.length = self._link.image.length
        self.parent_name = parent_name(self._link)

    async def check(self) -> None:
        """See `Source`."""
        if findings := await on_thread(lambda: self._image.verify_link(self._number)):
            raise ImageError(f"cannot upload {self.where}: it is damaged: {findings[0]}; take another checkpoint")

    async def read(self, first: int, extents: Sequence[Extent], sealing: Sealing, lacks: Lacks) -> list[Block]:
        """See `Source`."""
        return await on_thread(
            lambda: read_blocks(self._link.image.fileno(), self.where, first, extents, sealing, lacks)
        )

    async def frame(self) -> tuple[bytes, list[Chunk]]:
        """See `Source`."""
        return await in_thread(read_frame, self._link)


def file_sources(image: ImageFile, access: Access) -> list[Source]:
    """Return the images of a chain of files, child first, for an upload with these keys.

    Raises WrongKey if a file of the cache is from an encrypted image, and the upload would not encrypt it.
    """
    if access.keys is None:
        check_uploadable(image)
    return [FileSource(image, number) for number in range(len(image.links))]


def check_uploadable(image: ImageFile) -> None:
    """Raise WrongKey if a file of an image is from an encrypted image, and must not be uploaded without encryption."""
    for link in image.links:
        found = entry.entry_of(Path(os.path.realpath(link.path)))
        if found is not None and found[1].encrypted:
            raise WrongKey(
                f"cannot upload {link.path}: it is from the encrypted image {found[1].url}, and the upload would not "
                "be encrypted; give a key with `key` or `key_command`"
            )


def about_of(link: Link) -> About:
    """Return the description of an image file."""
    return About(link.metadata.kind, link.metadata.name, link.metadata.created)


def parent_name(link: Link) -> str:
    """Return the name of the file in which an image expects its parent; empty if it has none."""
    parent = link.metadata.parent
    return Path(parent.path).name if parent is not None else ""


def batches(extents: list[Extent]) -> Iterator[tuple[int, list[Extent]]]:
    """Yield the number of the first block, and the extents, of consecutive blocks of about `BATCH` bytes."""
    first, size = 0, 0
    for number, (_, length) in enumerate(extents):
        size += length
        if size >= BATCH or number + 1 == len(extents):
            yield first, extents[first : number + 1]
            first, size = number + 1, 0


def read_blocks(
    descriptor: int, where: str, first: int, extents: Sequence[Extent], sealing: Sealing, lacks: Lacks
) -> list[Block]:
    """Read storage blocks of a file, and bring them into the form of a pack (see `Reader`). Raises ImageError."""
    found = []
    for number, (offset, length) in enumerate(extents, start=first):
        try:
            stored = bytearray(os.pread(descriptor, length, offset))
        except OSError as error:
            raise ImageError(f"cannot read {where}: {error.strerror}") from error
        if len(stored) != length:
            raise ImageError(f"cannot read {where}: it was truncated during the upload")
        if not stored.startswith(blocks.MAGIC):  # a block that was not fetched is a hole
            raise ImageError(f"cannot read {where}: its storage block {number} is missing")
        checksum, flags = blocks.normalize(stored, number)
        flags |= blocks.SEALED if sealing.domain else 0
        address = sealing.address(stored)
        contents = sealing.seal_block(stored, address) if lacks(address) else b""
        found.append(Block(contents, address, checksum, flags))
    return found


def read_frame(link: Link) -> tuple[bytes, list[Chunk]]:
    """Read and compress the frame of an image file. Raises ImageError."""
    try:
        return frame.encode(link.image.fileno(), link.image.blocks, link.image.length)
    except OSError as error:
        raise ImageError(f"cannot read {link.path}: {error.strerror}") from error
