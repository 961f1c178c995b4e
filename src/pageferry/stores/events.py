"""Events and results of operations on images in stores."""

from __future__ import annotations

import msgspec

from pageferry.events import Event


class StoreProgress(Event, frozen=True, kw_only=True, tag="store-progress"):
    """Progress of an upload or a download."""

    image: str
    """URL of the image."""
    done: int
    """Bytes of storage blocks processed."""
    total: int


class ImagePushed(Event, frozen=True, kw_only=True, tag="image-pushed"):
    """Result of `image push`."""

    image: str
    """Path of the image file."""
    url: str
    manifest: str
    """Digest of the manifest, hexadecimal."""
    length: int
    """Size of the image file and of those of its parents that were uploaded, bytes."""
    blocks: int
    """Number of storage blocks of these files."""
    uploaded_blocks: int
    """Number of blocks that the store did not contain."""
    uploaded: int
    """Bytes uploaded, manifests included."""
    parents: int
    """Number of parents that the store did not contain."""
    existed: bool
    """Whether the store already contained this image under this name. Nothing was uploaded then."""
    encrypted: bool


class ImagePulled(Event, frozen=True, kw_only=True, tag="image-pulled"):
    """Result of `image pull`."""

    url: str
    image: str
    """Path of the image file."""
    manifest: str
    """Digest of the manifest, hexadecimal."""
    length: int
    """Size of the image file and of the parents that were written, bytes."""
    downloaded: int
    """Bytes downloaded, manifests included."""
    requests: int
    """Number of downloads of ranges of packs."""
    parents: list[str]
    """Parents that were written."""
    encrypted: bool


class StoredImage(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Image in a store, as its reference describes it. `digest`, `kind`, `workload` and `created` are None if the image
    is encrypted and the keys do not open it."""

    name: str
    url: str
    manifest: str
    id: str
    digest: str | None
    kind: str | None
    workload: str | None
    created: str | None
    """Time of the snapshot point, UTC, ISO 8601."""
    pushed: str
    """Time at which the image was published in the store, UTC, ISO 8601."""
    length: int
    """Size of the image file without its parents, bytes."""
    parents: int
    encrypted: bool


class StoreListing(Event, frozen=True, kw_only=True, tag="image-list"):
    """Result of `image list`."""

    store: str
    images: list[StoredImage]
    unreadable: list[str]
    """References that cannot be read, with the reason."""


class StoreStep(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Step of the check of a store."""

    name: str
    """`open`, `list`, `create`, `refuse` (replace an object that exists), `read` or `delete`."""
    passed: bool
    detail: str
    remedy: str = ""
    """Remedy, if the step has failed."""


class StoreCheck(Event, frozen=True, kw_only=True, tag="store-check"):
    """Result of `check --store`."""

    store: str
    steps: list[StoreStep]
    """Steps in their order, up to the first that has failed."""
    usable: bool
    """Whether images can be pushed, pulled and deleted; for a read-only store, whether the server replies."""
    reason: str | None
    """Reason why the store cannot be used, with a remedy; None if it can."""


class GarbageCollected(Event, frozen=True, kw_only=True, tag="image-gc"):
    """Result of `image gc`."""

    store: str
    kept: int
    """Number of manifests and packs that images need."""
    kept_bytes: int
    recent: int
    """Number of unneeded objects that are younger than the grace period."""
    condemned: int
    """Number of unneeded objects that were marked, now or by an earlier collection, and are deleted by a later one."""
    condemned_bytes: int
    deleted: int
    """Number of objects deleted."""
    freed: int
    """Bytes of the objects deleted."""


class CachedImage(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Image in the cache of this host."""

    url: str
    path: str
    length: int
    """Space of the image and of its parents, bytes. Parents that other entries share are counted for each."""
    contents: int
    """The same space when all storage blocks have been fetched, bytes."""
    complete: bool
    """Whether all storage blocks that the memory needs have been fetched: a restore reads nothing more from the
    store."""


class CacheListing(Event, frozen=True, kw_only=True, tag="cache-list"):
    """Result of `cache list`."""

    folder: str
    limit: int
    """Size above which entries are removed, bytes."""
    length: int
    """Space of all entries, bytes."""
    images: list[CachedImage]
    """Entries, least recently used first."""


class CacheCleared(Event, frozen=True, kw_only=True, tag="cache-cleared"):
    """Result of `cache clear`."""

    folder: str
    removed: list[str]
    """Directories of entries that were removed."""
    kept: list[str]
    """Directories of entries that are in use."""
    freed: int
    """Bytes."""
