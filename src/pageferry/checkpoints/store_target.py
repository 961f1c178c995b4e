"""Checkpoint straight to a store: the saver writes to a spool, and the upload follows it (`stores.streaming`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pageferry.checkpoints.events import UploadSummary
from pageferry.checkpoints.image_source import open_cache, open_journal, spool_limit
from pageferry.checkpoints.options import Options
from pageferry.errors import CheckpointError, ImageError, StoreError, UsageError
from pageferry.events import Listener
from pageferry.host.blocking import cancelled, in_thread
from pageferry.images.image import ImageFile
from pageferry.stores.address import ImageUrl
from pageferry.stores.keys import NO_KEYS, Access, open_access
from pageferry.stores.lazy_image import open_image_file
from pageferry.stores.options import KeyOptions
from pageferry.stores.push import Destination
from pageferry.stores.sources import Source, file_sources
from pageferry.stores.store import Store
from pageferry.stores.streaming import StreamedPush, check_name

T = TypeVar("T")


class StoreTarget:
    """Image in a store. `keys`: key with which it is encrypted."""

    uploads = True

    def __init__(self, url: ImageUrl, keys: KeyOptions) -> None:
        self.url = url
        self._keys = keys
        self._access = NO_KEYS
        self.name = str(url)
        self.path = Path("/") / "nonexistent" / url.name
        self.upload: UploadSummary | None = None
        self._push: StreamedPush | None = None
        self._following: asyncio.Task[None] | None = None

    def check(self, options: Options, parent: ImageFile | None) -> None:
        """See `Target`."""
        if options.disks.word != "record":
            raise UsageError(
                f"cannot use `disks` {options.disks.word} with {self.url}: saved disks are files of this host, which "
                "a store does not contain; use `disks` record, or write the image to a file"
            )

    @property
    def place(self) -> str:
        """See `Target`."""
        return f"the spool of {self.url} in {open_cache().folder}"

    async def prepare(self) -> None:
        """See `Target`."""
        self._access = Access((await open_access(self._keys)).keys)
        await check_name(Store(self.url.store, create=True), self.url)

    @asynccontextmanager
    async def opened(self, parent: ImageFile | None, listener: Listener) -> AsyncIterator[int]:
        """See `Target`."""
        cache, limit = open_cache(), spool_limit()
        cache.open()
        sources = await in_thread(self._sources, parent) if parent is not None else []
        store, journal = Store(self.url.store, create=True), open_journal(self.url.store)
        destination = Destination(store, self.url, journal, self._access)
        self._push = push = StreamedPush(destination, sources, listener)
        try:
            yield await push.prepare(cache.folder, limit)
            with self._translated():
                pushed = await push.complete()
            assert push.spool is not None
            self.upload = UploadSummary(
                manifest=pushed.manifest,
                uploaded=pushed.uploaded,
                blocks=pushed.uploaded_blocks,
                spool=push.spool.peak,
                encrypted=pushed.encrypted,
            )
        finally:
            await asyncio.shield(push.close())

    def _sources(self, parent: ImageFile) -> list[Source]:
        """Return the images of a chain to upload if the store lacks them, with all of their storage blocks. Raises
        ImageError if a file was replaced since the parent was opened."""
        found = open_image_file(parent.path, whole=True)
        if [link.identity for link in found.links] != [link.identity for link in parent.links]:
            raise ImageError(f"cannot use {parent.path} as a parent: it was replaced meanwhile; repeat the checkpoint")
        return file_sources(found, self._access)

    async def during(self, attempt: Coroutine[Any, Any, T]) -> T:
        """See `Target`."""
        assert self._push is not None
        if self._following is None:
            self._following = self._push.start()
        task = asyncio.ensure_future(attempt)
        try:
            await asyncio.wait({task, self._following}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            discarding = asyncio.ensure_future(self._push.discard()) if self._following.done() else None
            await cancelled(task)
            if discarding is not None:
                await cancelled(discarding)
        with self._translated():
            if self._following.done():
                self._following.result()
        return task.result()

    async def restart(self, file: int) -> None:
        """See `Target`."""
        assert self._push is not None
        with self._translated():
            self._following = await self._push.restart()

    def hold(self) -> None:
        """See `Target`."""
        if self._push is not None:
            self._push.hold()

    def release(self) -> None:
        """See `Target`."""
        if self._push is not None:
            self._push.release()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Add to errors of the upload that the workload is unharmed."""
        try:
            yield
        except (StoreError, CheckpointError) as error:
            published = self._push is not None and self._push.publishing
            effect = (
                f"the image may have been published: see `pageferry image list {self.url.store}`; a"
                if published
                else "no image was written, and a"
            )
            raise type(error)(f"{error}; {effect} running workload is unharmed") from error
