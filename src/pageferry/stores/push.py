"""Upload of images to a store: only what the store lacks, the reference last.

Order: packs, then the manifest, then the reference of the image, which is created only if there is none of its name.
Until then, no image refers to the uploaded objects, and garbage collections delete them after the grace period if this
process is killed. Before the reference is created, the upload checks that no collection has marked an object that it
reuses; otherwise it uploads these contents again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pageferry.errors import ImageError, StoreError
from pageferry.events import Listener
from pageferry.host.blocking import in_thread, on_thread
from pageferry.host.fault_points import fault_point
from pageferry.images.image import ImageFile, Link
from pageferry.stores import blocks, contents, frame, layout
from pageferry.stores.address import ImageUrl
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.contents import Contents
from pageferry.stores.events import ImagePushed, StoreProgress
from pageferry.stores.keys import NO_KEYS, Access, Keys
from pageferry.stores.layout import Ancestor, Chunk, Directory, PackEntry, Part, Reference
from pageferry.stores.library import digest
from pageferry.stores.manifests import FRAME, TABLE, Manifest, sealed
from pageferry.stores.options import PushOptions
from pageferry.stores.references import find_reference, identity, seal_reference
from pageferry.stores.sealing import KEY, PLAIN, Sealing
from pageferry.stores.store import Store

BATCH = 16 << 20
"""Bytes of storage blocks that are read at once."""
UPLOADS = 3
"""Maximum number of packs that are uploaded at a time. Memory: one more pack, and a batch."""
ATTEMPTS = 3
"""Number of attempts if garbage collections mark objects that the upload reuses."""
PUBLISH_TIMEOUT = 240.0
"""Maximum time for the creation of a reference, seconds. With `contents.CHECK_AFTER`, it is shorter than any grace
period (`options.MIN_GRACE`)."""


@dataclass(slots=True)
class _Pack:
    """Pack of this upload."""

    contents: bytearray
    entry: PackEntry | None = None
    """Set when the pack is complete."""


@dataclass(slots=True)
class _Block:
    """Storage block as it is written to a pack."""

    stored: bytearray
    digest: bytes
    checksum: bytes
    flags: int


class Packer:
    """Writer of packs. Blocks that the store contains (`known`), or that were added before, are not written again.
    `sealing` encrypts the others."""

    def __init__(self, store: Store, known: dict[bytes, tuple[PackEntry, int]], sealing: Sealing = PLAIN) -> None:
        self.blocks = 0
        """Number of blocks written."""
        self.uploaded = 0
        """Bytes uploaded."""
        self._store = store
        self._known = known
        self._sealing = sealing
        self._own: dict[bytes, tuple[_Pack, int]] = {}
        self._current: _Pack | None = None
        self._uploads: list[asyncio.Task[None]] = []
        self._slots = asyncio.Semaphore(UPLOADS)

    async def add(self, block: _Block) -> tuple[_Pack | PackEntry, int]:
        """Add a block. Return its pack and its offset there."""
        if (place := self._own.get(block.digest)) is not None:
            return place
        if (known := self._known.get(block.digest)) is not None:
            return known
        if self._current is None:
            self._current = _Pack(layout.new_pack(layout.ENCRYPTED if self._sealing.domain else 0))
        pack = self._current
        place = self._own[block.digest] = pack, len(pack.contents)
        pack.contents += self._sealing.seal_block(block.stored, block.digest)
        self.blocks += 1
        if len(pack.contents) >= layout.PACK_LENGTH:
            await self._complete()
        return place

    async def finish(self) -> None:
        """Upload the last pack, and wait for all uploads. Raises StoreError."""
        if self._current is not None:
            await self._complete()
        await asyncio.gather(*self._uploads)
        for found, (pack, start) in self._own.items():
            assert pack.entry is not None
            self._known.setdefault(found, (pack.entry, start))

    async def close(self) -> None:
        """Cancel the uploads."""
        for upload in self._uploads:
            upload.cancel()
        await asyncio.gather(*self._uploads, return_exceptions=True)

    async def _complete(self) -> None:
        assert self._current is not None
        pack, self._current = self._current, None
        await self._slots.acquire()
        for upload in self._uploads:
            if upload.done():
                upload.result()  # raises its error now, not after all other uploads
        data, pack.contents = bytes(pack.contents), bytearray()
        pack.entry = PackEntry(await in_thread(digest, data), len(data))
        self._uploads.append(asyncio.ensure_future(self._upload(pack.entry, data)))

    async def _upload(self, entry: PackEntry, data: bytes) -> None:
        try:
            await self._store.put(entry.key, data)
            self.uploaded += len(data)
        finally:
            self._slots.release()


class Push:
    """Upload of one image with its parents."""

    def __init__(
        self,
        store: Store,
        url: ImageUrl,
        image: ImageFile,
        listener: Listener,
        options: PushOptions,
        access: Access = NO_KEYS,
    ) -> None:
        self._store = store
        self._access = access
        self._url = url
        self._image = image
        self._options = options
        self._listener = listener
        self._done = 0
        self._total = sum(length for link in image.links for _, length in link.image.blocks)
        self._needed: set[str] = set()
        """Keys of all objects that the image needs."""
        self._sent: list[tuple[Link, int]] = []
        """Images uploaded, with the number of blocks that the store lacked."""
        self._uploaded = 0

    async def run(self) -> ImagePushed:
        """Upload the image, and create its reference. Raises ImageError, StoreError."""
        if (existing := await find_reference(self._store, self._url.name)) is not None:
            return await self._existing(existing)
        for _ in range(ATTEMPTS):
            known = await Contents.read(self._store, reuse=not self._options.reupload, keys=self._access.keys)
            manifest = await self._upload_chain(known)
            fault_point("store.uploaded")
            if not await known.unavailable(self._needed):
                break
        else:
            raise StoreError(
                f"cannot upload {self._image.path} to {self._url}: garbage collections delete objects that it needs; "
                "use a longer --grace for `pageferry image gc`, and repeat the upload"
            )
        return await self._publish(manifest)

    async def _existing(self, reference: Reference) -> ImagePushed:
        """Return the result if the store has this image under this name, encrypted if keys are given. Raises ImageError
        if it has another image."""
        if await identity(self._store, self._url, reference, self._access) != self._image.identity:
            raise ImageError(
                f"cannot upload {self._image.path} to {self._url}: the store has another image of this name, or this "
                "image, encrypted for other keys or not at all; delete it with `pageferry image delete`, or use "
                "another name"
            )
        return self._result(reference.manifest, existed=True)

    async def _upload_chain(self, known: Contents) -> Manifest:
        """Upload the images that the store lacks, oldest first. Return the manifest of the image."""
        self._needed, self._sent, self._done = set(), [], 0
        links = self._image.links
        manifest: Manifest | None = None
        for number in reversed(range(len(links))):
            ancestors = self._ancestors(number, manifest)
            manifest = await known.find(links[number].identity, ancestors)
            if manifest is None:
                manifest = await self._upload(number, ancestors, known)
            else:
                self._progress(sum(length for _, length in links[number].image.blocks))
            self._needed |= contents.needs(manifest)
        assert manifest is not None
        return manifest

    def _ancestors(self, number: int, parent: Manifest | None) -> list[Ancestor]:
        """Return the ancestors of an image of the chain, parent first."""
        if parent is None:
            return []
        recorded = self._image.links[number].metadata.parent
        assert recorded is not None
        return [contents.ancestor_of(parent, Path(recorded.path).name), *parent.directory.ancestors]

    async def _upload(self, number: int, ancestors: list[Ancestor], known: Contents) -> Manifest:
        """Upload the packs and the manifest of one image. Raises ImageError if the image is damaged."""
        link = self._image.links[number]
        if findings := await on_thread(lambda: self._image.verify_link(number)):
            raise ImageError(f"cannot upload {link.path}: it is damaged: {findings[0]}; take another checkpoint")
        packer = Packer(self._store, known.places, known.sealing)
        try:
            records, packs = await self._upload_blocks(link, packer, known.sealing)
        finally:
            await packer.close()
        stored, chunks = await in_thread(_frame, link)
        index = _Index(records, packs, stored, chunks, ancestors)
        manifest = await in_thread(lambda: _manifest(link, index, known.sealing, self._access.keys))
        await self._store.put(manifest.key, manifest.contents)
        self._uploaded += packer.uploaded + len(manifest.contents)
        self._sent.append((link, packer.blocks))
        return manifest

    async def _upload_blocks(
        self, link: Link, packer: Packer, sealing: Sealing
    ) -> tuple[list[BlockRecord], list[PackEntry]]:
        """Upload the packs of an image. Return the table of its blocks, and the packs that the table refers to."""
        placed: list[tuple[_Block, int, _Pack | PackEntry, int]] = []
        for first, extents in _batches(link.image.blocks):
            for at, block in enumerate(await on_thread(lambda: _read(link, first, extents, sealing))):  # noqa: B023
                placed.append((block, extents[at][0], *await packer.add(block)))
                block_length = extents[at][1]
                block.stored = bytearray()  # the pack has a copy
                self._progress(block_length)
        await packer.finish()
        lengths = [length for _, length in link.image.blocks]
        packs: dict[bytes, int] = {}
        entries: list[PackEntry] = []
        records = []
        for (block, offset, pack, start), length in zip(placed, lengths, strict=True):
            entry = pack if isinstance(pack, PackEntry) else pack.entry
            assert entry is not None
            if entry.digest not in packs:
                packs[entry.digest] = len(entries)
                entries.append(entry)
            place = packs[entry.digest], start
            records.append(BlockRecord(block.digest, block.checksum, offset, length, *place, block.flags))
        return records, entries

    async def _publish(self, manifest: Manifest) -> ImagePushed:
        """Create the reference, unless another upload has."""
        await self._store.sync()
        about, key = self._image.metadata, layout.reference_key(self._url.name)
        reference = Reference(
            format="pageferry-image",
            version=layout.VERSION,
            manifest=manifest.digest,
            manifest_length=manifest.first + len(manifest.contents),
            id=self._image.identity.id,
            digest=self._image.identity.digest,
            kind=about.kind,
            workload=about.name,
            created=about.created,
            length=self._image.image.length,
            parents=len(self._image.links) - 1,
        )
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT):
                published = seal_reference(reference, self._url.name, manifest.sealing)
                found = await self._create(key, msgspec.json.encode(published))
        except TimeoutError as error:
            raise StoreError(
                f"cannot publish {self._url}: the store did not reply within {PUBLISH_TIMEOUT:g} s; repeat the upload"
            ) from error
        if found is not None and found.manifest != manifest.digest:
            return await self._existing(found)
        fault_point("store.published")
        await self._store.sync()
        return self._result(manifest.digest, existed=False)

    async def _create(self, key: str, data: bytes) -> Reference | None:
        """Create the reference. Return None, or the existing reference, which is that of this upload if a reply was
        lost. Raises StoreError after `ATTEMPTS` failures."""
        for attempt in range(ATTEMPTS):
            failure = None
            try:
                if await self._store.create(key, data):
                    return None
            except StoreError as error:
                failure = error
            if (found := await find_reference(self._store, self._url.name)) is not None:
                return found
            await asyncio.sleep(0.2 * 2**attempt)
        raise failure or StoreError(f"cannot publish {self._url}: other processes delete it; repeat the upload")

    def _progress(self, length: int) -> None:
        self._done += length
        self._listener(StoreProgress(image=str(self._url), done=self._done, total=self._total))

    def _result(self, manifest: str, *, existed: bool) -> ImagePushed:
        sent = [] if existed else self._sent
        return ImagePushed(
            image=str(self._image.path),
            url=str(self._url),
            manifest=manifest,
            length=sum(link.image.length for link, _ in sent),
            blocks=sum(len(link.image.blocks) for link, _ in sent),
            uploaded_blocks=sum(count for _, count in sent),
            uploaded=self._uploaded,
            parents=sum(link is not self._image.links[0] for link, _ in sent),
            existed=existed,
            encrypted=self._access.keys is not None,
        )


@dataclass(frozen=True, slots=True)
class _Index:
    """Contents of a manifest."""

    records: list[BlockRecord]
    packs: list[PackEntry]
    frame: bytes
    chunks: list[Chunk]
    ancestors: list[Ancestor]


def _frame(link: Link) -> tuple[bytes, list[Chunk]]:
    try:
        return frame.encode(link.image.fileno(), link.image.blocks, link.image.length)
    except OSError as error:
        raise ImageError(f"cannot read {link.path}: {error.strerror}") from error


def _manifest(link: Link, index: _Index, sealing: Sealing, keys: Keys | None) -> Manifest:
    """Return the manifest of an image. `keys`: keys that wrap the domain of an encrypted image; otherwise None."""
    salt = os.urandom(KEY)
    table = sealing.seal_part(salt, TABLE, blocks.encode_table(index.records))
    stored = sealing.seal_part(salt, FRAME, index.frame)
    directory = Directory(
        random=os.urandom(16),
        id=link.identity.id,
        digest=link.identity.digest,
        length=link.image.length,
        packs=index.packs,
        blocks=Part(len(stored), len(table), digest(table)),
        count=len(index.records),
        frame=Part(0, len(stored), digest(stored)),
        chunks=index.chunks,
        ancestors=index.ancestors,
    )
    body = directory if keys is None else sealed(directory, salt, sealing, keys)
    data, found = layout.encode_manifest(stored + table, body)
    if len(data) > layout.MAX_MANIFEST:
        raise ImageError(f"cannot upload {link.path}: its index of {len(data)} bytes is too large for a store")
    key = layout.manifest_key(directory.id, found)
    return Manifest(key, found, data, directory, key, sealing=sealing, salt=salt)


def _batches(extents: list[tuple[int, int]]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield the number of the first block, and the extents, of consecutive blocks of about `BATCH` bytes."""
    first, size = 0, 0
    for number, (_, length) in enumerate(extents):
        size += length
        if size >= BATCH or number + 1 == len(extents):
            yield first, extents[first : number + 1]
            first, size = number + 1, 0


def _read(link: Link, first: int, extents: list[tuple[int, int]], sealing: Sealing) -> list[_Block]:
    """Read storage blocks, and bring them into their normal form. Raises ImageError."""
    found = []
    for number, (offset, length) in enumerate(extents, start=first):
        try:
            stored = bytearray(os.pread(link.image.fileno(), length, offset))
        except OSError as error:
            raise ImageError(f"cannot read {link.path}: {error.strerror}") from error
        if len(stored) != length:
            raise ImageError(f"cannot read {link.path}: it was truncated during the upload")
        checksum, flags = blocks.normalize(stored, number)
        flags |= blocks.SEALED if sealing.domain else 0
        found.append(_Block(stored, sealing.address(stored), checksum, flags))
    return found
