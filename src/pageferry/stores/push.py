"""Upload of images to a store: only what the store lacks, the reference last.

Order: packs, then the manifest, then the reference of the image, which is created only if there is none of its name.
Until then, no image refers to the uploaded objects, and garbage collections delete them after the grace period if this
process is killed. Before the reference is created, the upload checks that no collection has marked an object that it
reuses; otherwise it uploads these contents again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pageferry.errors import ImageError, StoreError
from pageferry.events import Listener
from pageferry.host.blocking import in_background, in_thread
from pageferry.host.fault_points import fault_point
from pageferry.stores import blocks, contents, layout
from pageferry.stores.address import ImageUrl
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.contents import Contents
from pageferry.stores.events import ImagePushed, StoreProgress
from pageferry.stores.journal import Journal
from pageferry.stores.keys import NO_KEYS, Access, Keys
from pageferry.stores.layout import Ancestor, Chunk, Directory, PackEntry, Part, Reference
from pageferry.stores.library import digest
from pageferry.stores.manifests import FRAME, TABLE, Manifest, sealed
from pageferry.stores.options import PushOptions
from pageferry.stores.references import find_reference, identity, seal_reference
from pageferry.stores.sealing import KEY, PLAIN, Domain, Sealing
from pageferry.stores.sources import Block, Extent, Reader, Source, batches
from pageferry.stores.store import Store

UPLOADS = 3
"""Maximum number of packs that are uploaded at a time. Memory: one more pack, and a batch."""
ATTEMPTS = 3
"""Number of attempts if garbage collections mark objects that the upload reuses."""
PUBLISH_TIMEOUT = 240.0
"""Maximum time from the listing of the marks until the reference exists, seconds. With `contents.CHECK_AFTER`, it is
shorter than any grace period (`options.MIN_GRACE`)."""


@dataclass(slots=True)
class _Pack:
    """Pack of this upload."""

    contents: bytearray
    blocks: list[tuple[bytes, int]] = field(default_factory=list)
    """Content address and offset of each storage block."""
    entry: PackEntry | None = None
    """Set when the pack is complete."""


class Packer:
    """Writer of packs. Blocks that the store contains (`known`), or that were added before, are not written again.
    `sealing`: that of the upload."""

    def __init__(
        self,
        store: Store,
        known: dict[bytes, tuple[PackEntry, int]],
        sealing: Sealing = PLAIN,
        journal: Journal | None = None,
    ) -> None:
        self.sealing = sealing
        self.blocks = 0
        """Number of blocks written."""
        self.uploaded = 0
        """Bytes uploaded."""
        self._store = store
        self._journal = journal
        self._known = known
        self._own: dict[bytes, tuple[_Pack, int]] = {}
        self._current: _Pack | None = None
        self._uploads: list[asyncio.Task[None]] = []
        self._slots = asyncio.Semaphore(UPLOADS)

    def lacks(self, block: bytes) -> bool:
        """Return whether the contents of the block with this address must be added."""
        return block not in self._own and block not in self._known

    async def add(self, block: Block) -> tuple[_Pack | PackEntry, int]:
        """Add a block. Return its pack and its offset there."""
        if (place := self._own.get(block.digest)) is not None:
            return place
        if (known := self._known.get(block.digest)) is not None:
            return known
        if self._current is None:
            self._current = _Pack(layout.new_pack(layout.ENCRYPTED if self.sealing.domain else 0))
        pack = self._current
        place = self._own[block.digest] = pack, len(pack.contents)
        pack.blocks.append((block.digest, len(pack.contents)))
        pack.contents += block.stored
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
        data, pack.contents = pack.contents, bytearray()
        pack.entry = PackEntry(await in_background(lambda: digest(data)), len(data))
        self._uploads.append(asyncio.ensure_future(self._upload(pack, pack.entry, data)))

    async def _upload(self, pack: _Pack, entry: PackEntry, data: bytearray) -> None:
        try:
            await self._store.put(entry.key, data)
            self.uploaded += len(data)
            fault_point("store.pack-uploaded")
            if self._journal is not None:
                await in_thread(self._journal.add, entry, pack.blocks)
        finally:
            self._slots.release()


class BlockUpload:
    """Upload of the storage blocks of one image, in the order of the file. The file may still grow."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        self.extents: list[Extent] = []
        """Extents of the blocks that were added."""
        self._placed: list[tuple[Block, _Pack | PackEntry, int]] = []

    async def add(self, source: Reader, extents: Sequence[Extent]) -> None:
        """Add the blocks that follow the previous ones. Waits for uploads if the packs in memory are not uploaded yet.

        Raises ImageError, StoreError.
        """
        read = await source.read(len(self._placed), extents, self.packer.sealing, self.packer.lacks)
        for at, block in enumerate(read):
            self._placed.append((block, *await self.packer.add(block)))
            self.extents.append(extents[at])
            block.stored = b""  # the pack has a copy

    async def finish(self) -> tuple[list[BlockRecord], list[PackEntry]]:
        """Upload the last pack. Return the table of the blocks, and the packs that the table refers to."""
        await self.packer.finish()
        packs: dict[bytes, int] = {}
        entries: list[PackEntry] = []
        records = []
        for (block, pack, start), (offset, length) in zip(self._placed, self.extents, strict=True):
            entry = pack if isinstance(pack, PackEntry) else pack.entry
            assert entry is not None
            if entry.digest not in packs:
                packs[entry.digest] = len(entries)
                entries.append(entry)
            place = packs[entry.digest], start
            records.append(BlockRecord(block.digest, block.checksum, offset, length, *place, block.flags))
        return records, entries


@dataclass(frozen=True, slots=True)
class Destination:
    """Destination of an upload."""

    store: Store
    url: ImageUrl
    journal: Journal | None = None
    access: Access = NO_KEYS
    """Keys with which the image and its parents are encrypted."""
    domain: Domain | None = None
    """Key domain that the upload continues if the store has none of these keys; None for a new one."""


class Push:
    """Upload of one image with its parents. `sources`: the image, then its ancestors."""

    def __init__(
        self, destination: Destination, sources: Sequence[Source], listener: Listener, options: PushOptions
    ) -> None:
        self._destination = destination
        self._store = destination.store
        self._url = destination.url
        self._access = destination.access
        self._domain = destination.domain
        self._journal = destination.journal
        self._sources = sources
        self._options = options
        self._listener = listener
        self._done = 0
        self._total = sum(length for source in sources for _, length in source.extents)
        self._needed: set[str] = set()
        """Keys of all objects that the image needs."""
        self._sent: list[tuple[Source, int]] = []
        """Images uploaded, with the number of blocks that the store lacked."""
        self._uploaded = 0
        self.manifests: list[Manifest] = []
        """Manifests without a reference whose storage blocks are reused: those of this upload."""
        self.publishing = False
        """Whether the reference may have been created."""

    async def run(self) -> ImagePushed:
        """Upload the image, and create its reference. Raises ImageError, StoreError."""
        if (existing := await find_reference(self._store, self._url.name)) is not None:
            return await self._existing(existing)
        for _ in range(ATTEMPTS):
            known = await self._read_contents()
            self._needed, self._sent, self._done = set(), [], 0
            manifest = await self._upload_chain(known)
            fault_point("store.uploaded")
            if (pushed := await self._publish(known, manifest)) is not None:
                return pushed
        raise StoreError(
            f"cannot upload {self._name} to {self._url}: garbage collections delete objects that it needs; "
            "use a longer --grace for `pageferry image gc`, and repeat the upload"
        )

    async def _read_contents(self) -> Contents:
        """Read what the store contains, with the packs of this upload and of interrupted ones."""
        keys, journal = self._access.keys, self._journal
        if self._domain is None and keys is not None and journal is not None:
            self._domain = await in_thread(journal.domain, keys)
        known = await Contents.read(self._store, reuse=not self._options.reupload, keys=keys, domain=self._domain)
        if isinstance(known.sealing, Domain) and keys is not None:
            self._domain = known.sealing
            if journal is not None:
                journal.key = await in_thread(keys.wrap, known.sealing)
        for earlier in self.manifests:
            await in_thread(known.add, earlier)
        if journal is not None:
            await in_thread(known.add_packs, journal.packs())
        return known

    @property
    def _image(self) -> Source:
        return self._sources[0]

    @property
    def _name(self) -> str:
        """Name of the image, for messages."""
        return self._image.where

    async def _existing(self, reference: Reference) -> ImagePushed:
        """Return the result if the store has this image under this name, encrypted if keys are given. Raises ImageError
        if it has another image."""
        if await identity(self._store, self._url, reference, self._access) != self._image.identity:
            raise ImageError(
                f"cannot upload {self._name} to {self._url}: the store has another image of this name, or this image, "
                "encrypted for other keys or not at all; delete it with `pageferry image delete`, or use another name"
            )
        return self._result(reference.manifest, existed=True)

    async def _upload_chain(self, known: Contents) -> Manifest:
        """Upload the images that the store lacks, oldest first. Return the manifest of the first source."""
        _check_blocks(self._name, sum(len(source.extents) for source in self._sources))
        manifest: Manifest | None = None
        for source in reversed(self._sources):
            ancestors = self._ancestors(source, manifest)
            manifest = await known.find(source.identity, ancestors)
            if manifest is None:
                manifest = await self._upload(source, ancestors, known)
            else:
                self._progress(sum(length for _, length in source.extents))
            self._needed |= contents.needs(manifest)
        assert manifest is not None
        return manifest

    def _ancestors(self, source: Source, parent: Manifest | None) -> list[Ancestor]:
        """Return the ancestors of an image of the chain, parent first."""
        if parent is None:
            return []
        return [contents.ancestor_of(parent, source.parent_name), *parent.directory.ancestors]

    async def _upload(self, source: Source, ancestors: list[Ancestor], known: Contents) -> Manifest:
        """Upload the packs and the manifest of one image. Raises ImageError if the image is damaged."""
        await source.check()
        upload = BlockUpload(Packer(self._store, known.places, known.sealing, self._journal))
        try:
            for _, extents in batches(source.extents):
                await upload.add(source, extents)
                self._progress(sum(length for _, length in extents))
            return await self._complete(source, ancestors, upload)
        finally:
            await upload.packer.close()

    async def _complete(self, source: Source, ancestors: list[Ancestor], upload: BlockUpload) -> Manifest:
        """Upload the last pack and the manifest of an image whose blocks were added."""
        records, packs = await upload.finish()
        older = self._sources[self._sources.index(source) + 1 :] if source in self._sources else self._sources
        _check_blocks(source.where, len(records) + sum(len(one.extents) for one in older))
        stored, chunks = await source.frame()
        index, sealing = _Index(records, packs, stored, chunks, ancestors), upload.packer.sealing
        manifest = await in_thread(lambda: _manifest(source, index, sealing, self._access.keys, str(self._store.url)))
        await self._store.put(manifest.key, manifest.contents)
        self._uploaded += upload.packer.uploaded + len(manifest.contents)
        self._sent.append((source, upload.packer.blocks))
        self.manifests.append(manifest)
        return manifest

    async def _publish(self, known: Contents, manifest: Manifest) -> ImagePushed | None:
        """Create the reference, unless another upload has. Return None if a collection has marked an object that the
        image needs.

        The time limit includes the listing of the marks: a mark that is set after the listing has begun must be younger
        than the grace period when the reference exists.
        """
        await self._store.sync(self._needed)
        about, key = self._image.about, layout.reference_key(self._url.name)
        reference = Reference(
            format="pageferry-image",
            version=layout.VERSION,
            manifest=manifest.digest,
            manifest_length=manifest.first + len(manifest.contents),
            id=self._image.identity.id,
            digest=self._image.identity.digest,
            kind=about.kind,
            workload=about.workload,
            created=about.created,
            length=self._image.length,
            parents=len(self._sources) - 1,
        )
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT):
                if await known.unavailable(self._needed):
                    return None
                published = seal_reference(reference, self._url.name, manifest.sealing)
                self.publishing = True
                found = await self._create(key, msgspec.json.encode(published))
        except TimeoutError as error:
            raise StoreError(
                f"cannot publish {self._url}: the store did not reply within {PUBLISH_TIMEOUT:g} s; repeat the upload"
            ) from error
        if found is not None and found.manifest != manifest.digest:
            return await self._existing(found)
        fault_point("store.published")
        await self._store.sync()
        if self._journal is not None:
            await in_thread(self._journal.remove, self._needed)
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
        self._listener(StoreProgress(image=str(self._url), done=self._done, total=max(self._total, self._done)))

    def _result(self, manifest: str, *, existed: bool) -> ImagePushed:
        sent = [] if existed else self._sent
        return ImagePushed(
            image=self._name,
            url=str(self._url),
            manifest=manifest,
            length=sum(source.length for source, _ in sent),
            blocks=sum(len(source.extents) for source, _ in sent),
            uploaded_blocks=sum(count for _, count in sent),
            uploaded=self._uploaded,
            parents=sum(source is not self._image for source, _ in sent),
            existed=existed,
            encrypted=self._access.keys is not None,
        )


def _check_blocks(where: str, count: int) -> None:
    """Raise ImageError if a chain has more storage blocks than readers accept."""
    if count > blocks.MAX_BLOCKS:
        raise ImageError(
            f"cannot upload {where}: it and its parents have {count} storage blocks, more than {blocks.MAX_BLOCKS}; "
            "use larger storage blocks, or flatten the image"
        )


@dataclass(frozen=True, slots=True)
class _Index:
    """Contents of a manifest."""

    records: list[BlockRecord]
    packs: list[PackEntry]
    frame: bytes
    chunks: list[Chunk]
    ancestors: list[Ancestor]


def _manifest(source: Source, index: _Index, sealing: Sealing, keys: Keys | None, store: str) -> Manifest:
    """Return the manifest of an image. `keys`: keys that wrap the domain of an encrypted image; otherwise None."""
    salt = os.urandom(KEY)
    table = sealing.seal_part(salt, TABLE, blocks.encode_table(index.records))
    stored = sealing.seal_part(salt, FRAME, index.frame)
    directory = Directory(
        random=os.urandom(16),
        id=source.identity.id,
        digest=source.identity.digest,
        length=source.length,
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
        raise ImageError(f"cannot upload {source.where}: its index of {len(data)} bytes is too large for a store")
    key = layout.manifest_key(directory.id, found)
    return Manifest(key, found, data, directory, f"{store}/{key}", sealing=sealing, salt=salt)
