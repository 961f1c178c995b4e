"""Images to restore, given by a path or by the URL of an image in a store, whose index is first read to the cache."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pageferry import values
from pageferry.errors import UsageError
from pageferry.host.blocking import on_new_loop
from pageferry.host.registry import Registry
from pageferry.stores.address import image_url, is_url
from pageferry.stores.options import OpenOptions

if TYPE_CHECKING:
    from pageferry.stores.cache import ImageCache, OpenEntry

FOLDER, LIMIT = "PAGEFERRY_CACHE_DIR", "PAGEFERRY_CACHE_SIZE"
"""Environment variables with the directory and the maximum size of the cache."""
DEFAULT_LIMIT = 32 << 30
NO_KEY = OpenOptions()


def open_cache() -> ImageCache:
    """Return the cache of this user on this host. Raises UsageError if an environment variable is invalid."""
    from pageferry.pager.recorded_images import recorded_images
    from pageferry.stores.cache import ImageCache

    given = os.environ.get(LIMIT)
    limit = DEFAULT_LIMIT if not given else values.size(LIMIT, given, 1, 1 << 60)
    return ImageCache(_folder(), limit, lambda: recorded_images(Registry()))


@asynccontextmanager
async def local_image_async(name: str, source: str | Path, keys: OpenOptions = NO_KEY) -> AsyncIterator[Path]:
    """Yield the path of an image, the value of the parameter `name`. `keys`: key of an encrypted image in a store.

    An image in a store gets an entry in the cache, unless the cache has one, and stays in the cache at least until the
    end of the block. Its storage blocks are fetched when they are read: open it with `lazy_image.open_image_file`.
    Raises ImageError, StoreError, UsageError, UnsupportedError, WrongKey.
    """
    if not is_url(source):
        yield _path(name, source, keys)
        return
    entry = await _obtain(name, str(source), keys)
    try:
        yield entry.path
    finally:
        entry.close()


@contextmanager
def local_image(name: str, source: str | Path, keys: OpenOptions = NO_KEY) -> Iterator[Path]:
    """Yield the path of an image, like `local_image_async`, to a caller that blocks."""
    if not is_url(source):
        yield _path(name, source, keys)
        return
    entry = on_new_loop(lambda: _obtain(name, str(source), keys))
    try:
        yield entry.path
    finally:
        entry.close()


async def _obtain(name: str, source: str, keys: OpenOptions) -> OpenEntry:
    from pageferry.stores.keys import open_access

    url = image_url(name, source)
    access = await open_access(keys)
    return await open_cache().obtain(url, access)


def _path(name: str, source: str | Path, keys: OpenOptions) -> Path:
    """Return the path of an image file. Raises UsageError if a key is given, which would have no effect."""
    given = next((option for option in ("key", "key_command") if getattr(keys, option) is not None), None)
    if given is not None:
        raise UsageError(f"`{given}` has no effect for the image file {source}: only images in stores are encrypted")
    return values.path(name, source)


def _folder() -> Path:
    """Return $PAGEFERRY_CACHE_DIR, or else /var/cache/pageferry as root, and the directory for caches of the user
    otherwise. Raises UsageError if it cannot be determined."""
    if given := os.environ.get(FOLDER):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/pageferry")
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        raise UsageError(f"cannot choose a directory for the cache: there is no home directory; set {FOLDER}")
    return base / "pageferry"
