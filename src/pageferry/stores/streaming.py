"""Upload of an image while it is written: a checkpoint straight to a store (S4).

The writer fills a spool, and the upload follows it with the same packs as for a complete file. The writer never waits
for the store: if the store is slower, the spool grows, up to its limit. When the index is complete, the manifest and
the reference are published as for a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pageferry.errors import ImageError
from pageferry.events import Listener
from pageferry.host.blocking import in_thread, on_thread
from pageferry.host.fault_points import fault_point
from pageferry.images.image import link_of
from pageferry.stores import contents, layout
from pageferry.stores.address import ImageUrl
from pageferry.stores.contents import Contents
from pageferry.stores.copy import StoredSource
from pageferry.stores.events import ImagePushed
from pageferry.stores.layout import Chunk
from pageferry.stores.manifests import Manifest, read_manifest
from pageferry.stores.options import PushOptions
from pageferry.stores.push import BlockUpload, Destination, Packer, Push
from pageferry.stores.references import find_reference
from pageferry.stores.sources import Extent, Source, about_of, parent_name, read_frame
from pageferry.stores.spool import Spool
from pageferry.stores.store import Budget, Store, gathered

POLL = 0.05
"""Interval at which the spool is searched for complete blocks, seconds."""
CHECK = 0.1
"""Interval at which the space of the spool is checked, seconds."""
PROGRESS = 0.2
"""Minimum interval between two progress events, seconds."""


async def check_name(store: Store, url: ImageUrl) -> None:
    """Check that an image can be created. Raises ImageError if the store has an image of this name, StoreError."""
    if await find_reference(store, url.name) is not None:
        raise ImageError(
            f"cannot write {url}: the store has an image of this name; delete it with `pageferry image delete`, or use "
            "another name"
        )
    await store.probe()


class StreamedPush(Push):
    """Upload of an image that is being written, and of its parents if the store lacks them. The spool is not encrypted.

    Calls in order: `prepare`; `start`; `restart` if the writer begins again; `complete`; `close` in any case.
    """

    def __init__(self, destination: Destination, parents: Sequence[Source], listener: Listener) -> None:
        super().__init__(destination, parents, listener, PushOptions())
        self.spool: Spool | None = None
        self._known: Contents | None = None
        self._parent: Manifest | None = None
        self._packer: Packer | None = None
        self._blocks: BlockUpload | None = None
        self._following: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._reported = 0.0

    async def prepare(self, folder: Path, limit: int) -> int:
        """Upload the parents that the store lacks, and return the descriptor of the spool in `folder`. The workload is
        not touched before this call returns. Raises ImageError, StoreError, CheckpointError.
        """
        self._known = known = await self._read_contents()
        if self._sources:
            self._parent = await self._upload_chain(known)
        self._packer = Packer(self._store, known.places, known.sealing, self._journal)
        self.spool = await on_thread(lambda: Spool(folder, limit))
        return self.spool.descriptor

    def start(self) -> asyncio.Task[None]:
        """Begin to follow the spool. The task fails if blocks cannot be uploaded, or if the spool is full; it ends
        after `complete`."""
        assert self._packer is not None
        self._ended.clear()
        self._quiet.set()
        self._blocks = blocks = BlockUpload(self._packer)
        self._following = asyncio.ensure_future(self._follow(blocks))
        return self._following

    async def restart(self) -> asyncio.Task[None]:
        """Empty the spool, and follow it from the beginning. Packs that were uploaded are reused. Raises OSError."""
        assert self.spool is not None
        await self._end()
        self.spool.restart()
        return self.start()

    def hold(self) -> None:
        """Start no further work until `release`: the workload is paused."""
        self._quiet.clear()

    def release(self) -> None:
        """Continue after `hold`."""
        self._quiet.set()

    async def complete(self) -> ImagePushed:
        """Upload the rest of the complete image, and create its reference. Raises ImageError, StoreError."""
        assert self.spool is not None, "the upload was prepared"
        assert self._blocks is not None
        assert self._known is not None
        await self._end()
        image = await in_thread(_SpooledImage, self.spool)
        known, done = self._known, len(self._blocks.extents)
        if self._blocks.extents != image.extents[:done]:
            raise ImageError(f"cannot write {self._url}: the index of {self.spool.where} does not match its blocks")
        await self._blocks.add(self.spool, image.extents[done:])
        manifest = await self._complete(image, self._ancestors(image, self._parent), self._blocks)
        self._needed |= contents.needs(manifest)
        self._sources = [image, *self._sources]
        fault_point("store.uploaded")
        if (pushed := await self._publish(known, manifest)) is not None:
            return pushed
        return await self._publish_again(manifest)

    async def _publish_again(self, manifest: Manifest) -> ImagePushed:
        """Upload the image again, from the store itself, because a garbage collection deletes objects that it needs:
        the spool no longer contains them. A marked object exists for at least the grace period."""
        budget = Budget(layout.MAX_MANIFESTS)
        ancestors = manifest.directory.ancestors
        stored = await gathered(read_manifest(self._store, one.key, one.manifest, budget=budget) for one in ancestors)
        found = [manifest, *[await in_thread(one.open_in, manifest.sealing) for one in stored]]
        about = self._image.about
        sources = [StoredSource(self._store, one, await in_thread(one.records), about) for one in found]
        again = Push(replace(self._destination, domain=self._domain), sources, self._listener, PushOptions())
        again.manifests += self.manifests
        return await again.run()

    async def close(self) -> None:
        """Stop all work, and free the spool."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self._packer is not None:
            await self._packer.close()
        if self.spool is not None:
            self.spool.close()

    @property
    def _name(self) -> str:
        return "the checkpoint"

    async def _end(self) -> None:
        """Wait until the upload has read all complete blocks."""
        assert self._following is not None
        self._ended.set()
        self.release()  # an attempt can fail while the workload is paused
        await self._following

    async def _follow(self, blocks: BlockUpload) -> None:
        watching = asyncio.ensure_future(self._watch())
        uploading = asyncio.ensure_future(self._upload_new(blocks))
        try:
            await asyncio.wait({watching, uploading}, return_when=asyncio.FIRST_COMPLETED)
            if not uploading.done():
                watching.result()
            await uploading
        finally:
            for task in (uploading, watching):
                task.cancel()
            await asyncio.gather(watching, uploading, return_exceptions=True)

    async def _upload_new(self, blocks: BlockUpload) -> None:
        """Upload the blocks that the writer completes, and free their space."""
        assert self.spool is not None
        spool = self.spool
        while True:
            await self._quiet.wait()
            ended = self._ended.is_set()
            if extents := await on_thread(spool.find):
                await blocks.add(spool, extents)
                await self._free(extents)
                self._progress(sum(length for _, length in extents))
            elif ended:
                return
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), POLL)

    async def discard(self) -> None:
        """Discard what the writer appends, until this call is cancelled. A writer that cannot be cancelled would
        otherwise fill the disk after the upload has failed."""
        assert self.spool is not None
        while True:
            if extents := await on_thread(self.spool.find):
                await self._free(extents)
            else:
                await asyncio.sleep(POLL)

    async def _free(self, extents: Sequence[Extent]) -> None:
        """Free the space of these blocks and of all before. On cancellation, wait until no thread uses the spool."""
        assert self.spool is not None
        spool, end = self.spool, sum(extents[-1])
        await on_thread(lambda: spool.free(end))

    async def _watch(self) -> None:
        """Raise CheckpointError when the spool has reached its limit, until its writer has ended."""
        assert self.spool is not None
        while not self._ended.is_set():
            self.spool.check_space()
            await asyncio.sleep(CHECK)

    def _progress(self, length: int) -> None:
        self._done += length
        if (now := time.monotonic()) - self._reported >= PROGRESS:
            self._reported = now
            super()._progress(0)


class _SpooledImage:
    """Complete image in a spool, whose storage blocks were freed. Raises ImageError."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._link = link_of(spool.descriptor, Path(spool.where))
        self.where = spool.where
        self.identity = self._link.identity
        self.about = about_of(self._link)
        self.extents: list[Extent] = self._link.image.blocks
        self.length = self._link.image.length
        self.parent_name = parent_name(self._link)
        self.read = spool.read

    async def check(self) -> None:
        """Do nothing: the writer has verified what it wrote."""

    async def frame(self) -> tuple[bytes, list[Chunk]]:
        """Return the compressed frame and its chunks."""
        return await in_thread(read_frame, self._link)
