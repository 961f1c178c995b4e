"""Targets of checkpoints: a file, or an image in a store."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pageferry import values
from pageferry.checkpoints.image_source import NO_KEY, refuse_key
from pageferry.checkpoints.options import Options
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import on_new_loop, on_thread
from pageferry.images.image import ImageFile, beside, new_file
from pageferry.stores.address import image_url, is_url
from pageferry.stores.options import KeyOptions

if TYPE_CHECKING:
    from pageferry.checkpoints.events import UploadSummary

T = TypeVar("T")


class Target(Protocol):
    """Place of a new image."""

    @property
    def name(self) -> str:
        """Absolute path, or URL."""

    @property
    def path(self) -> Path:
        """Path of the image. For an image in a store, a path that does not exist."""

    @property
    def place(self) -> str:
        """Place that is written to, for messages."""

    @property
    def uploads(self) -> bool:
        """Whether the image is uploaded while it is written."""

    @property
    def upload(self) -> UploadSummary | None:
        """Upload to a store, when the image is published; None for a file."""

    def check(self, options: Options, parent: ImageFile | None) -> None:
        """Raise UsageError if the image cannot be written with these options and this parent."""

    async def prepare(self) -> None:
        """Check that the image can be created. Raises ImageError, StoreError."""

    def opened(self, parent: ImageFile | None, listener: Listener) -> AbstractAsyncContextManager[int]:
        """Return a context that yields an empty file for the image. The image is published if the block ends without an
        error. Raises OSError, and the errors of the store before the block begins."""

    async def during(self, attempt: Coroutine[Any, Any, T]) -> T:
        """Run an attempt to write the image, and return its result. Cancel the attempt if the image cannot be kept."""

    async def restart(self, file: int) -> None:
        """Empty the file for another attempt."""

    def hold(self) -> None:
        """Do no work in this process while the workload is paused, until `release`."""

    def release(self) -> None:
        """Continue after `hold`."""


class FileTarget:
    """Image file. `path` is made absolute."""

    uploads = False
    upload = None

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.name = self.place = str(self.path)

    def check(self, options: Options, parent: ImageFile | None) -> None:
        """See `Target`."""
        if self.path.is_dir():
            raise UsageError(f"cannot write {self.path}: it is a directory; give the name of a file")
        if parent is None:
            return
        needed = beside(self.path, parent.path)
        if not (needed.exists() and needed.samefile(parent.path)):
            raise UsageError(
                f"cannot write {self.path}: its parent {parent.path} must be in the same directory; write to "
                f"{parent.path.parent}, or put a symbolic link to the parent into {self.path.parent}"
            )
        parent.check_target(self.path)

    async def prepare(self) -> None:
        """See `Target`."""

    @asynccontextmanager
    async def opened(self, parent: ImageFile | None, listener: Listener) -> AsyncIterator[int]:
        """See `Target`."""
        with new_file(self.path) as file:
            yield file

    async def during(self, attempt: Coroutine[Any, Any, T]) -> T:
        """See `Target`."""
        return await attempt

    async def restart(self, file: int) -> None:
        """See `Target`."""
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)

    def hold(self) -> None:
        """See `Target`."""

    def release(self) -> None:
        """See `Target`."""


def write_image(place: Target, write: Callable[[int], T]) -> T:
    """Write an image by a call that blocks, with the descriptor of an empty file, and publish it. Return the result of
    the call. An upload follows the call while it writes. Raises OSError, and the errors of the store."""
    if not place.uploads:
        with new_file(place.path) as file:
            return write(file)
    return on_new_loop(lambda: _write_image(place, write))


async def _write_image(place: Target, write: Callable[[int], T]) -> T:
    await place.prepare()
    async with place.opened(None, ignore) as file:
        return await place.during(on_thread(lambda: write(file)))


def target(name: str, value: object, keys: KeyOptions = NO_KEY) -> Target:
    """Return the target with this path or URL, the value of the parameter `name`. `keys`: key with which an image in a
    store is encrypted. Raises UsageError."""
    if not is_url(value):
        path = values.path(name, value)
        refuse_key(path, keys)
        return FileTarget(path)
    url = image_url(name, value)
    if url.manifest is not None:
        raise UsageError(f"cannot write {url}: the digest of a new manifest is not known yet; remove @DIGEST")
    if not url.store.writable:
        raise UsageError(f"cannot write {url}: {url.store.scheme} is read-only; use the URL of the bucket")
    from pageferry.checkpoints.store_target import StoreTarget

    return StoreTarget(url, keys)
