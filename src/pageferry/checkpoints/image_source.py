"""Images to restore, given by a path or by the URL of an image in a store, whose index is first read to the cache."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from pageferry import values
from pageferry.errors import StoreError, UsageError
from pageferry.host.blocking import on_new_loop
from pageferry.host.registry import Registry
from pageferry.stores.address import StoreUrl, image_url, is_url
from pageferry.stores.options import KeyOptions, OpenOptions

if TYPE_CHECKING:
    from pageferry.stores.cache import ImageCache, OpenEntry
    from pageferry.stores.journal import Journal

log = getLogger(__name__)

FOLDER, LIMIT, SPOOL = "PAGEFERRY_CACHE_DIR", "PAGEFERRY_CACHE_SIZE", "PAGEFERRY_SPOOL_SIZE"
"""Environment variables with the directory and the maximum size of the cache, and the maximum size of a spool."""
DEFAULT_LIMIT = 32 << 30
NO_KEY = OpenOptions()


def open_cache() -> ImageCache:
    """Return the cache of this user on this host. Raises UsageError if an environment variable is invalid."""
    from pageferry.pager.recorded_images import recorded_images
    from pageferry.stores.cache import ImageCache

    given = os.environ.get(LIMIT)
    limit = DEFAULT_LIMIT if not given else values.size(LIMIT, given, 1, 1 << 60)
    return ImageCache(_folder(), limit, lambda: recorded_images(Registry()))


def open_journal(store: StoreUrl) -> Journal | None:
    """Return the journal of uploads to a store, in the directory of the cache; None if that cannot be used."""
    from pageferry.stores.journal import Journal

    try:
        cache = open_cache()
        cache.open()
    except (UsageError, StoreError) as error:
        log.info("%s: an interrupted upload will not be continued: %s", store, error)
        return None
    return Journal(cache.folder, store)


def spool_limit() -> int:
    """Return the maximum size of a spool (`stores.spool`), bytes; 0 for no limit. Raises UsageError."""
    given = os.environ.get(SPOOL)
    return values.size(SPOOL, given, 1, 1 << 60) if given else 0


def image_argument(name: str, source: str | Path) -> str | Path:
    """Check the path or the URL of an image, the value of the parameter `name`, before anything happens.

    Raises UsageError.
    """
    if not is_url(source):
        return values.path(name, source)
    image_url(name, source)
    return source  # with the digest of the manifest, if it names one


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


def refuse_key(source: str | Path, keys: KeyOptions) -> None:
    """Raise UsageError if a key is given for an image file, where it would have no effect."""
    given = next((option for option in ("key", "key_command") if getattr(keys, option) is not None), None)
    if given is not None:
        raise UsageError(f"`{given}` has no effect for the image file {source}: only images in stores are encrypted")


def keys_for(keys: OpenOptions, *sources: str | Path | None) -> list[OpenOptions]:
    """Return the keys for each of the images that are read: `keys` for those in stores. Raises UsageError if keys are
    given, and all images are files."""
    if not any(map(is_url, sources)):
        refuse_key(next(source for source in sources if source is not None), keys)
    return [keys if is_url(source) else NO_KEY for source in sources]


def _path(name: str, source: str | Path, keys: OpenOptions) -> Path:
    """Return the path of an image file. Raises UsageError if a key is given."""
    refuse_key(source, keys)
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
