"""Cache of images from stores on this host."""

from __future__ import annotations

from pageferry.checkpoints.image_source import open_cache
from pageferry.host.blocking import interruptible
from pageferry.stores.events import CacheCleared, CacheListing


def list_cache() -> CacheListing:
    """List the images that restores from stores have fetched to this host, completely or in part. Raises UsageError.

    Examples:
        >>> import pageferry
        >>> listing = pageferry.list_cache()
    """
    cache = open_cache()
    return interruptible(cache.listing)


def clear_cache() -> CacheCleared:
    """Remove the images that restores from stores have fetched, except those that restores need.

    Raises UsageError, StoreError.

    Examples:
        >>> import pageferry
        >>> result = pageferry.clear_cache()
    """
    cache = open_cache()
    cache.open()
    return interruptible(cache.clear)
