"""References and manifests in a store: reading, listing and removal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import TypeVar

from pageferry.errors import ImageError
from pageferry.host.blocking import in_thread
from pageferry.stores import blocks, layout
from pageferry.stores.address import ImageUrl
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.events import StoredImage, StoreListing
from pageferry.stores.layout import Directory, Reference
from pageferry.stores.store import Budget, ObjectMissing, Store, StoredObject

T = TypeVar("T")

TAIL = 1 << 20
"""Bytes that are read first from the end of a manifest."""
REQUESTS = 16
"""Maximum number of small requests at a time."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Manifest of an image, in memory."""

    key: str
    digest: str
    contents: bytes
    directory: Directory
    where: str
    """URL, for messages."""
    first: int = 0
    """Offset of `contents` in the manifest, bytes."""

    def records(self) -> list[BlockRecord]:
        """Verify and return the table of storage blocks. Raises ImageError."""
        directory = self.directory
        table = layout.part_of(self.contents, directory.blocks, self.where, self.first)
        lengths = [pack.length for pack in directory.packs]
        try:
            blocks.check_count(directory.count, directory.blocks.length)
            return blocks.decode_table(table, directory.count, lengths, directory.length)
        except ImageError as error:
            raise ImageError(f"cannot read {self.where}: {error}") from error

    def frame(self) -> memoryview:
        """Verify and return the stored frame. Raises ImageError."""
        return layout.part_of(self.contents, self.directory.frame, self.where, self.first)


async def read_reference(store: Store, name: str) -> Reference:
    """Read the reference of an image. Raises ImageError, ObjectMissing, StoreError."""
    key = layout.reference_key(name)
    return layout.decode_reference(await store.get(key, layout.MAX_REFERENCE), f"{store.url}/{key}")


async def find_reference(store: Store, name: str) -> Reference | None:
    """Read the reference of an image, or return None if there is none."""
    try:
        return await read_reference(store, name)
    except ObjectMissing:
        return None


async def open_image(store: Store, url: ImageUrl) -> tuple[Reference, list[Manifest]]:
    """Read the manifests of an image and of its ancestors, image first. Raises ImageError, StoreError."""
    try:
        reference = await read_reference(store, url.name)
    except ObjectMissing as error:
        raise ObjectMissing(
            f"cannot find {url}: the store has no image of this name; `pageferry image list {url.store}` lists images"
        ) from error
    try:
        budget = Budget(layout.MAX_MANIFESTS)
        manifest = await read_manifest(store, reference.key, reference.manifest, budget)
    except ObjectMissing as error:
        raise ImageError(f"cannot read {url}: its manifest is missing: {error}") from error
    if manifest.directory.identity != reference.identity:
        raise ImageError(f"cannot read {url}: its manifest is that of another image")
    reads = [read_manifest(store, one.key, one.manifest, budget) for one in manifest.directory.ancestors]
    ancestors = await gathered(reads)
    if (count := sum(one.directory.count for one in (manifest, *ancestors))) > blocks.MAX_BLOCKS:
        raise ImageError(
            f"cannot read {url}: it and its ancestors have {count} storage blocks, expected at most {blocks.MAX_BLOCKS}"
        )
    for expected, found in zip(manifest.directory.ancestors, ancestors, strict=True):
        if found.directory.identity != expected.identity:
            raise ImageError(f"cannot read {url}: the manifest of its parent {expected.name} is that of another image")
    return reference, [manifest, *ancestors]


async def read_manifest(store: Store, key: str, manifest: str, budget: Budget | None = None) -> Manifest:
    """Read and verify a manifest. `manifest`: its digest, hexadecimal; `budget`: memory for it and other manifests.

    Raises ImageError, ObjectMissing, StoreError.
    """
    where = f"{store.url}/{key}"
    contents = await store.get(key, layout.MAX_MANIFEST, budget)
    directory = await in_thread(layout.decode_manifest, contents, manifest, where)
    return Manifest(key, manifest, contents, directory, where)


async def read_tail(store: Store, key: str, manifest: str, length: int) -> Manifest:
    """Read and verify the end of a manifest of `length` bytes: its directory, and the table of storage blocks. The
    frame is in the contents only if the manifest is short. Raises ImageError, ObjectMissing, StoreError."""
    where, size = f"{store.url}/{key}", min(length, TAIL)
    if not layout.TRAILER <= length <= layout.MAX_MANIFEST:
        raise ImageError(f"cannot read {where}: it has {length} bytes, so it is not a manifest, or is truncated")
    while True:
        contents = bytes(await store.get_range(key, length - size, size))
        needed = layout.tail_length(contents, length)
        if size >= min(needed, length):
            break
        size = min(needed, length)
    directory = await in_thread(layout.decode_manifest, contents, manifest, where)
    needed = length - directory.blocks.offset
    if directory.blocks.length > directory.count * blocks.RECORD.size + TAIL or needed > length:
        raise ImageError(f"cannot read {where}: its table of storage blocks has an invalid length")
    if needed > size:
        contents = bytes(await store.get_range(key, directory.blocks.offset, needed))
    return Manifest(key, manifest, contents, directory, where, length - len(contents))


async def list_images(store: Store) -> StoreListing:
    """List the images of a store. Raises StoreError."""
    entries = await store.list("images")
    found = await gathered(_describe(store, entry) for entry in entries)
    return StoreListing(
        store=str(store.url),
        images=[one for one in found if isinstance(one, StoredImage)],
        unreadable=[one for one in found if isinstance(one, str)],
    )


async def delete_reference(store: Store, url: ImageUrl) -> None:
    """Delete the reference of an image. Its manifest and packs remain until garbage collections delete them.

    Raises ImageError if there is no such image, StoreError.
    """
    key = layout.reference_key(url.name)
    if await store.find(key) is None:
        raise ImageError(f"cannot delete {url}: the store has no image of this name")
    await store.delete(key)


async def gathered(calls: Iterable[Coroutine[object, object, T]], limit: int = REQUESTS) -> list[T]:
    """Run coroutines, at most `limit` at a time, and return their results in order. After an error, cancel the others,
    and raise the error."""
    slots = asyncio.Semaphore(limit)

    async def one(call: Coroutine[object, object, T]) -> T:
        async with slots:
            return await call

    pending = list(calls)
    tasks = [asyncio.ensure_future(one(call)) for call in pending]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for call in pending:
            call.close()  # those that have not begun
        raise


async def _describe(store: Store, entry: StoredObject) -> StoredImage | str | None:
    """Return the description of an image, a reason why there is none, or None if the image has just been deleted."""
    name = entry.key.removeprefix("images/")
    try:
        found = await read_reference(store, name)
    except ObjectMissing:
        return None
    except ImageError as error:
        return str(error)
    return StoredImage(
        name=name,
        url=f"{store.url}/{name}",
        manifest=found.manifest,
        id=found.id,
        digest=found.digest,
        kind=found.kind,
        workload=found.workload,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.created)),
        pushed=entry.modified.strftime("%Y-%m-%dT%H:%M:%SZ"),
        length=found.length,
        parents=found.parents,
    )
