"""Copies of images between stores: only storage blocks that the other store lacks are downloaded and uploaded.

An encrypted image is opened with its key. Its blocks are copied as they are if the target has its key domain; otherwise
all of them are downloaded and encrypted again, because their content addresses differ. The first encrypted image of a
target therefore continues the key domain of the source (`push.Destination`).
"""

from __future__ import annotations

from collections.abc import Sequence

from pageferry.errors import ImageError, StoreError
from pageferry.host.blocking import in_thread
from pageferry.stores.address import ImageUrl
from pageferry.stores.blocks import NORMAL, SEALED, BlockRecord
from pageferry.stores.keys import Access
from pageferry.stores.layout import Chunk
from pageferry.stores.manifests import Manifest
from pageferry.stores.pull import DOWNLOADS, RANGE, Range, ranges
from pageferry.stores.references import open_described
from pageferry.stores.sealing import Domain, Sealing
from pageferry.stores.sources import About, Block, Extent, Lacks, Source
from pageferry.stores.store import Store, gathered


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

    async def read(self, first: int, extents: Sequence[Extent], sealing: Sealing, lacks: Lacks) -> list[Block]:
        """See `Source`."""
        records, flag = self._records[first : first + len(extents)], SEALED if sealing.domain else 0
        found = [Block(b"", one.digest, one.checksum, one.flags & NORMAL | flag) for one in records]
        same = sealing.domain == self._manifest.sealing.domain
        wanted = [(number, one) for number, one in enumerate(records) if not same or lacks(one.digest)]
        packs = self._manifest.directory.packs
        new = None if same else sealing
        await gathered((self._fetch(one, found, new) for one in ranges(wanted, packs, RANGE)), DOWNLOADS)
        return found

    async def frame(self) -> tuple[bytes, list[Chunk]]:
        """See `Source`."""
        return bytes(await in_thread(self._manifest.frame)), self._manifest.directory.chunks

    async def _fetch(self, wanted: Range, found: list[Block], new: Sealing | None) -> None:
        """Read a range, and set the contents of its blocks. Read it once more if it cannot be read or is damaged."""
        sealing = self._manifest.sealing
        for last in (False, True):
            try:
                data = await self._store.get_range(wanted.pack.key, wanted.start, wanted.end - wanted.start)
                await in_thread(_set_blocks, wanted, data, found, sealing, new)
                return
            except (ImageError, StoreError) as error:
                if last and isinstance(error, StoreError):
                    raise
                if last:
                    raise ImageError(
                        f"cannot copy {self.where}: {self._store.url}/{wanted.pack.key} is missing, or was damaged, "
                        f"truncated or replaced: {error}; copy another image"
                    ) from error


def _set_blocks(wanted: Range, data: memoryview, found: list[Block], sealing: Sealing, new: Sealing | None) -> None:
    """Verify the blocks of a range, and set their contents. `new`: sealing of the upload; None if the blocks are
    uploaded as they are. Raises ImageError."""
    for number, record in wanted.blocks:
        start = record.start - wanted.start
        stored = data[start : start + record.stored]
        block = sealing.open_block(stored, record.digest) if len(stored) == record.stored else None
        if block is None:
            raise ImageError(f"the storage block at byte {record.start} does not match its digest")
        if new is None:
            found[number].stored = bytes(stored)
        else:
            address = found[number].digest = new.address(block)
            found[number].stored = new.seal_block(block, address)


async def stored_sources(store: Store, url: ImageUrl, access: Access) -> tuple[list[Source], Domain | None]:
    """Return an image of a store and its ancestors, and the key domain that a copy can continue, if it is encrypted for
    exactly the recipients of the keys. Raises ImageError, StoreError, WrongKey."""
    about, manifests, domain = await open_described(store, url, access)
    described = About(about.kind, about.workload, about.created)
    return [StoredSource(store, one, await in_thread(one.records), described) for one in manifests], domain
