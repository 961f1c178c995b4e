"""Block tables of cached images: where the storage blocks of an image are in a store, and the keys that open them.

A table opens the blocks of one image, and no others of its key domain. It is in the directory of a cache entry, which
contains the decrypted blocks of the same image as well. Its last 32 bytes are the BLAKE3 digest of the bytes before.
"""

from __future__ import annotations

import os

import msgspec

from pageferry.errors import ImageError
from pageferry.stores import layout
from pageferry.stores.blocks import RECORD, BlockRecord
from pageferry.stores.layout import PackEntry
from pageferry.stores.library import digest
from pageferry.stores.manifests import Manifest
from pageferry.stores.sealing import KEY, PLAIN, BlockKeys, BlockOpener, Domain

_DIGEST = 32


class BlockTable(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of a table."""

    packs: list[PackEntry]
    blocks: bytes
    """Records (`blocks.RECORD`), in the order of the image."""
    domain: bytes = b""
    """Key domain; empty if the image is not encrypted."""
    keys: bytes = b""
    """Key of each block; empty if the image is not encrypted."""

    @property
    def records(self) -> list[BlockRecord]:
        """Records of the storage blocks."""
        return [BlockRecord._make(one) for one in RECORD.iter_unpack(self.blocks)]

    def sealing(self, records: list[BlockRecord]) -> BlockOpener:
        """Return the protection of the blocks. `records`: those of this table, which are decoded only once."""
        if not self.domain:
            return PLAIN
        addresses = [record.digest for record in records]
        keys = [self.keys[start : start + KEY] for start in range(0, len(self.keys), KEY)]
        return BlockKeys(self.domain, dict(zip(addresses, keys, strict=True)))


def encode(manifest: Manifest) -> bytes:
    """Return the table of an image. Raises ImageError if the manifest is damaged."""
    records, sealing = manifest.records(), manifest.sealing
    keys = [sealing.block_key(record.digest) for record in records] if isinstance(sealing, Domain) else []
    table = BlockTable(
        packs=manifest.directory.packs,
        blocks=b"".join(RECORD.pack(*record) for record in records),
        domain=sealing.domain,
        keys=b"".join(keys),
    )
    contents = msgspec.msgpack.encode(table)
    return contents + digest(contents)


def read(descriptor: int) -> BlockTable:
    """Read the table in a file. Raises ImageError if it is damaged, OSError."""
    contents = os.pread(descriptor, min(os.fstat(descriptor).st_size, layout.MAX_MANIFEST), 0)
    if digest(contents[:-_DIGEST]) != contents[-_DIGEST:]:
        raise ImageError("the block table in the cache is damaged; run `pageferry cache clear`")
    return msgspec.msgpack.decode(contents[:-_DIGEST], type=BlockTable)
