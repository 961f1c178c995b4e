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
from pageferry.stores import references
from pageferry.stores.address import ImageUrl, StoreUrl, image_url, is_url, store_url
from pageferry.stores.check import check_store as check
from pageferry.stores.collect import collect
from pageferry.stores.copy import stored_sources
from pageferry.stores.events import GarbageCollected, ImagePulled, ImagePushed, StoreCheck, StoreListing
from pageferry.stores.keys import Access, open_access
from pageferry.stores.lazy_image import open_image_file
from pageferry.stores.options import (
    CollectArguments,
    CollectOptions,
    KeyArguments,
    KeyOptions,
    OpenArguments,
    OpenOptions,
    PushArguments,
    PushOptions,
)
from pageferry.stores.pull import Pull
from pageferry.stores.push import Destination, Push
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
    was uploaded. `options` are the fields of `pageferry.stores.options.PushOptions`: reupload, key, key_command. With a
    key, the image and its parents are encrypted.

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

        Encrypted, with a key that a file contains:

        >>> import os
        >>> _ = Path("store.key").write_bytes(os.urandom(32))
        >>> Path("store.key").chmod(0o600)
        >>> pageferry.push_image("table.img", f"{store}/secret", key="store.key").encrypted
        True
        >>> restored = pageferry.restore(f"{store}/secret", key="store.key")
    """
    chosen, source = values.options(PushOptions, options), values.path("path", path)
    target = _new_image("url", image_url("url", url, source.name))
    check_listener("listener", values.function("listener", listener))
    access = await open_access(chosen)
    image = await in_own_thread(lambda: open_image_file(source, whole=True))
    sources = await in_own_thread(lambda: file_sources(image, access))
    journal = await in_own_thread(lambda: open_journal(target.store))
    destination = Destination(Store(target.store, create=True), target, journal, access)
    return await Push(destination, sources, listener, chosen).run()


push_image = synchronous(push_image_async)


async def pull_image_async(
    url: str, path: str | Path, *, listener: Listener = ignore, **options: Unpack[OpenArguments]
) -> ImagePulled:
    """Download an image from a store to a file, and its parents to the same directory.

    Every storage block is verified. The file replaces an existing file of its name when it is complete; after an error,
    it is unchanged. A parent that is already in the directory is not downloaded. `listener` is called with
    StoreProgress events. `options` are the fields of `pageferry.stores.options.OpenOptions`: key, key_command,
    allow_plain.

    Raises ImageError if an object is missing, damaged, truncated or replaced, or if another file has the name of a
    parent, WrongKey if the image is encrypted and the key does not open it, StoreError, UsageError, UnsupportedError
    without the extra `stores`.

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
    chosen = values.options(OpenOptions, options)
    source, target = image_url("url", url), values.path("path", path)
    check_listener("listener", values.function("listener", listener))
    access = await open_access(chosen)
    return await Pull(Store(source.store), source, target, listener, access).run()


pull_image = synchronous(pull_image_async)


async def copy_image_async(
    path: str | Path, target: str | Path, *, listener: Listener = ignore, **options: Unpack[OpenArguments]
) -> ImagePushed | ImagePulled:
    """Copy an image and its parents from one store to another. Only storage blocks that the target lacks are copied.

    If one of both is a file, this is `push_image` or `pull_image`. If the URL of the target ends with a slash, the copy
    has the name of the image. Between stores, each storage block is verified, and the reference is created last, as for
    `push_image`. `listener` is called with StoreProgress events. `options`: key, key_command and allow_plain. The key
    opens an encrypted image, and encrypts the copy in the target.

    Raises ImageError if an object is missing, damaged, truncated or replaced, or if the target has another image of
    this name, WrongKey if the image is encrypted and the key does not open it, StoreError, UsageError, UnsupportedError
    without the extra `stores`.

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
        return await pull_image_async(str(path), target, listener=listener, **options)
    chosen = values.options(OpenOptions, options)
    if not is_url(path):
        if chosen.allow_plain:
            raise UsageError(f"`allow_plain` has no effect for the image file {path}; remove it")
        keys: KeyArguments = {"key": chosen.key, "key_command": chosen.key_command}
        return await push_image_async(path, str(target), listener=listener, **keys)
    source = image_url("path", path)
    place = _new_image("target", image_url("target", target, source.name))
    check_listener("listener", values.function("listener", listener))
    access = await open_access(chosen)
    images, domain = await stored_sources(Store(source.store), source, access)
    journal = await in_own_thread(lambda: open_journal(place.store))
    destination = Destination(Store(place.store, create=True), place, journal, Access(access.keys), domain)
    return await Push(destination, images, listener, PushOptions()).run()


copy_image = synchronous(copy_image_async)


async def list_images_async(url: str, **options: Unpack[KeyArguments]) -> StoreListing:
    """List the images of a store. `options`: with key or key_command, encrypted images that the key opens are
    described.

    Raises StoreError, UsageError, UnsupportedError without the extra `stores`.

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
    chosen, address = values.options(KeyOptions, options), store_url("url", url)
    if not address.writable:
        raise UsageError(f"cannot list {address}: {address.scheme} has no listings; use the URL of an image")
    access = await open_access(chosen)
    return await references.list_images(Store(address), access)


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


def _new_image(name: str, url: ImageUrl) -> ImageUrl:
    """Check the URL of an image to create. Raises UsageError."""
    if url.manifest is not None:
        raise UsageError(
            f"invalid `{name}` {str(url)!r}: the digest of a new manifest is not known yet; remove @DIGEST"
        )
    found: ImageUrl = _writable(name, url)
    return found


def _writable(name: str, url: StoreUrl | ImageUrl) -> Any:
    address = url.store if isinstance(url, ImageUrl) else url
    if not address.writable:
        raise UsageError(
            f"invalid `{name}` {str(url)!r}: {address.scheme} is read-only; use s3://, gs://, az:// or file://"
        )
    return url
