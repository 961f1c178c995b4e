"""Images in object stores: upload, download, listing, deletion and garbage collection."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from pageferry import values
from pageferry.checkpoints.image_source import open_journal
from pageferry.control.disks import delete_image as delete_file
from pageferry.control.events import ImageDeleted
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import in_own_thread, on_thread, synchronous
from pageferry.images.image import ImageFile
from pageferry.stores import references
from pageferry.stores.address import ImageUrl, StoreUrl, image_url, is_url, store_url
from pageferry.stores.check import check_store as check
from pageferry.stores.collect import collect
from pageferry.stores.copy import stored_sources
from pageferry.stores.events import GarbageCollected, ImagePulled, ImagePushed, StoreCheck, StoreListing
from pageferry.stores.options import CollectArguments, CollectOptions, PushArguments, PushOptions
from pageferry.stores.pull import Pull
from pageferry.stores.push import Push
from pageferry.stores.sources import file_sources
from pageferry.stores.store import Store
from pageferry.workloads.callbacks import check_listener


async def push_image_async(
    path: str | Path, url: str, *, listener: Listener = ignore, **options: Unpack[PushArguments]
) -> ImagePushed:
    """Upload an image and its parents to a store. Only storage blocks that the store lacks are uploaded.

    `url`: URL of the image in the store (see docs/stores.md); if it ends with a slash, the image has the name of the
    file. `listener` is called with StoreProgress events. If the store already has this image under this name, nothing
    is uploaded. After an error or a crash, the store has no image of this name, and garbage collections delete what
    was uploaded. `options` are the fields of `pageferry.stores.options.PushOptions`: reupload.

    Raises ImageError if the image is damaged, or if the store has another image of this name, StoreError, UsageError,
    UnsupportedError without the extra `stores`.

    Examples:
        >>> from pathlib import Path
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> store = Path("store").absolute().as_uri()
        >>> pushed = pageferry.push_image("table.img", f"{store}/table")
        >>> restored = pageferry.restore(f"{store}/table")  # through the cache of this host
    """
    chosen, source = values.options(PushOptions, options), values.path("path", path)
    target = _writable("url", image_url("url", url, source.name))
    check_listener("listener", values.function("listener", listener))
    image = await in_own_thread(lambda: ImageFile(source))
    journal = await in_own_thread(lambda: open_journal(target.store))
    return await Push(Store(target.store, create=True), target, file_sources(image), listener, chosen, journal).run()


push_image = synchronous(push_image_async)


async def pull_image_async(url: str, path: str | Path, *, listener: Listener = ignore) -> ImagePulled:
    """Download an image from a store to a file, and its parents to the same directory.

    Every storage block is verified. The file replaces an existing file of its name when it is complete; after an error,
    it is unchanged. A parent that is already in the directory is not downloaded. `listener` is called with
    StoreProgress events.

    Raises ImageError if an object is missing, damaged, truncated or replaced, or if another file has the name of a
    parent, StoreError, UsageError, UnsupportedError without the extra `stores`.

    Examples:
        >>> from pathlib import Path
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> store = Path("store").absolute().as_uri()
        >>> pushed = pageferry.push_image("table.img", f"{store}/table")
        >>> pulled = pageferry.pull_image(f"{store}/table", "again.img")
        >>> pageferry.compare_images("table.img", "again.img").same
        True
    """
    source, target = image_url("url", url), values.path("path", path)
    check_listener("listener", values.function("listener", listener))
    return await Pull(Store(source.store), source, target, listener).run()


pull_image = synchronous(pull_image_async)


async def copy_image_async(
    path: str | Path, target: str | Path, *, listener: Listener = ignore
) -> ImagePushed | ImagePulled:
    """Copy an image and its parents from one store to another. Only storage blocks that the target lacks are copied.

    If one of both is a file, this is `push_image` or `pull_image`. If the URL of the target ends with a slash, the copy
    has the name of the image. Between stores, each storage block is verified, and the reference is created last, as for
    `push_image`. `listener` is called with StoreProgress events.

    Raises ImageError if an object is missing, damaged, truncated or replaced, or if the target has another image of
    this name, StoreError, UsageError, UnsupportedError without the extra `stores`.

    Examples:
        >>> from pathlib import Path
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> store, backup = (Path(name).absolute().as_uri() for name in ("store", "backup"))
        >>> result = pageferry.checkpoint(arena, f"{store}/table")
        >>> copied = pageferry.copy_image(f"{store}/table", f"{backup}/")
        >>> print([image.name for image in pageferry.list_images(backup).images], copied.existed)
        ['table'] False
    """
    if not is_url(target):
        if not is_url(path):
            raise UsageError(f"cannot copy {path}: neither it nor {target} is in a store; copy files with cp")
        return await pull_image_async(str(path), target, listener=listener)
    if not is_url(path):
        return await push_image_async(path, str(target), listener=listener)
    source = image_url("path", path)
    place = _writable("target", image_url("target", target, source.name))
    check_listener("listener", values.function("listener", listener))
    images = await stored_sources(Store(source.store), source)
    journal = await in_own_thread(lambda: open_journal(place.store))
    return await Push(Store(place.store, create=True), place, images, listener, PushOptions(), journal).run()


copy_image = synchronous(copy_image_async)


async def list_images_async(url: str) -> StoreListing:
    """List the images of a store. Raises StoreError, UsageError, UnsupportedError without the extra `stores`.

    Examples:
        >>> from pathlib import Path
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> store = Path("store").absolute().as_uri()
        >>> pushed = pageferry.push_image("table.img", f"{store}/table")
        >>> [image.name for image in pageferry.list_images(store).images]
        ['table']
    """
    address = store_url("url", url)
    if not address.writable:
        raise UsageError(f"cannot list {address}: {address.scheme} has no listings; use the URL of an image")
    return await references.list_images(Store(address))


list_images = synchronous(list_images_async)


async def check_store_async(url: str) -> StoreCheck:
    """Check whether the credentials in the environment permit the operations that images need: list, create an object
    unless it exists, read a range, delete. The result names a remedy for the step that fails.

    The object of the check has the prefix `checks/` in the store. Failed requests are repeated for 10 s. Raises
    UsageError, UnsupportedError without the extra `stores`.

    Examples:
        >>> from pathlib import Path
        >>> import pageferry
        >>> Path("store").mkdir()
        >>> found = pageferry.check_store(Path("store").absolute().as_uri())
        >>> print(found.usable, [step.name for step in found.steps])
        True ['open', 'list', 'create', 'refuse', 'read', 'delete']
    """
    return await check(store_url("url", url))


check_store = synchronous(check_store_async)


async def collect_garbage_async(url: str, **options: Unpack[CollectArguments]) -> GarbageCollected:
    """Delete objects of a store that no image needs. The first collection marks them, and a collection after the grace
    period deletes them. Uploads can run at the same time.

    `options` are the fields of `pageferry.stores.options.CollectOptions`: grace. Raises ImageError, before anything is
    deleted, if an image in the store cannot be read, StoreError, UsageError, UnsupportedError without the extra
    `stores`.

    Examples:
        >>> from pathlib import Path
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> store = Path("store").absolute().as_uri()
        >>> pushed = pageferry.push_image("table.img", f"{store}/table")
        >>> collected = pageferry.collect_garbage(store)
    """
    chosen = values.options(CollectOptions, options)
    address = _writable("url", store_url("url", url))
    return await collect(Store(address), chosen.grace)


collect_garbage = synchronous(collect_garbage_async)


async def delete_image_async(path: str | Path) -> ImageDeleted:
    """Delete an image file, or an image in a store, given its URL.

    With a file, also delete copies of disks that no other image and no overlay needs. Frozen disks are kept; they
    become writable again if nothing else needs them. In a store, images that refer to this image remain usable, and
    garbage collections free its space.

    Raises ImageError if the image cannot be opened or deleted, or if a file is the parent of another image; no copy of
    a disk is deleted in these cases. Raises StoreError, UsageError, UnsupportedError without the extra `stores`.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> memoryview(arena)[0] = 7
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> pageferry.delete_image("table.img").removed  # copies of disks; an arena has none
        []
    """
    if is_url(path):
        target = _writable("path", image_url("path", path))
        await references.delete_reference(Store(target.store), target)
        return ImageDeleted(image=str(target), removed=[], kept=[])
    return await on_thread(lambda: delete_file(path))


delete_image = synchronous(delete_image_async)


def _writable(name: str, url: StoreUrl | ImageUrl) -> Any:
    address = url.store if isinstance(url, ImageUrl) else url
    if not address.writable:
        raise UsageError(
            f"invalid `{name}` {str(url)!r}: {address.scheme} is read-only; use s3://, gs://, az:// or file://"
        )
    return url
