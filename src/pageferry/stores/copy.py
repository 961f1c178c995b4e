"""Copies of images between stores: only storage blocks that the other store lacks are downloaded and uploaded."""

from __future__ import annotations

from collections.abc import Sequence

from pageferry.errors import ImageError, StoreError
from pageferry.host.blocking import in_thread
from pageferry.stores.address import ImageUrl
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.layout import Chunk
from pageferry.stores.library import digest
from pageferry.stores.pull import DOWNLOADS, Range, ranges
from pageferry.stores.references import Manifest, gathered, open_image
from pageferry.stores.sources import About, Block, Extent, Lacks, Source
from pageferry.stores.store import Store


class StoredSource:
    """Image in a store."""

    def __init__(self, store: Store, manifest: Manifest, records: list[BlockRecord], about: About) -> None:
        self._store = store
        self._manifest = manifest
        self._records = records
        directory = manifest.directory
        self.where = manifest.where
        self.identity = directory.identity
        self.about = about
        self.extents: list[Extent] = [(record.offset, record.length) for record in records]
        self.length = directory.length
        self.parent_name = directory.ancestors[0].name if directory.ancestors else ""

    async def check(self) -> None:
        """Do nothing: each block is verified when it is read."""

    async def read(self, first: int, extents: Sequence[Extent], lacks: Lacks) -> list[Block]:
        """See `Source`."""
        records = self._records[first : first + len(extents)]
        found = [Block(bytearray(), record.digest, record.checksum, record.flags) for record in records]
        wanted = {number: record for number, record in enumerate(records) if lacks(record.digest)}
        packs = self._manifest.directory.packs
        await gathered((self._fetch(one, found) for one in ranges(wanted.items(), packs)), DOWNLOADS)
        return found

    async def frame(self) -> tuple[bytes, list[Chunk]]:
        """See `Source`."""
        return bytes(await in_thread(self._manifest.frame)), self._manifest.directory.chunks

    async def _fetch(self, wanted: Range, found: list[Block]) -> None:
        """Read a range, and set the contents of its blocks. Read it once more if it cannot be read or is damaged."""
        for last in (False, True):
            try:
                data = await self._store.get_range(wanted.pack.key, wanted.start, wanted.end - wanted.start)
                await in_thread(_set_blocks, wanted, data, found)
                return
            except (ImageError, StoreError) as error:
                if last and isinstance(error, StoreError):
                    raise
                if last:
                    raise ImageError(
                        f"cannot copy {self.where}: {self._store.url}/{wanted.pack.key} is missing, or was damaged, "
                        f"truncated or replaced: {error}; copy another image"
                    ) from error


def _set_blocks(wanted: Range, data: memoryview, found: list[Block]) -> None:
    """Verify the blocks of a range in the form in which they are in the pack. Raises ImageError."""
    for number, record in wanted.blocks:
        start = record.start - wanted.start
        stored = bytearray(data[start : start + record.length])
        if len(stored) != record.length or digest(stored) != record.digest:
            raise ImageError(f"the storage block at byte {record.start} does not match its digest")
        found[number].stored = stored


async def stored_sources(store: Store, url: ImageUrl) -> list[Source]:
    """Return an image of a store and its ancestors. Raises ImageError, StoreError."""
    reference, manifests = await open_image(store, url)
    about = About(reference.kind, reference.workload, reference.created)
    return [StoredSource(store, one, await in_thread(one.records), about) for one in manifests]
