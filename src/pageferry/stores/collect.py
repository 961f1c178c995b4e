"""Garbage collection of a store: mark unneeded objects, and delete them in a later collection.

Needed are the manifests to which references refer, those younger than the grace period, which belong to uploads in
progress, the manifests of their ancestors, and the packs of all of them. No key is needed: the outline of an encrypted
manifest is readable, and readers of the image authenticate it. The protocol with uploads:

1. A collection reads the marks first, then the references. It deletes an unneeded object only if its mark is older than
   the grace period. It writes marks for all other unneeded objects, before it deletes any object.
2. An upload does not reuse objects with a mark. It reads the marks again just before it creates its reference.

If an upload has seen no mark on an object, the mark is younger than that check. The collection that deletes the object
therefore reads the references later than the grace period after the check, and finds the reference. Ages are
differences between times of the store, so that the clock of this host does not matter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from logging import getLogger

from pageferry.errors import ImageError, StoreError
from pageferry.host.fault_points import fault_point
from pageferry.stores.contents import needs
from pageferry.stores.events import GarbageCollected
from pageferry.stores.layout import Ancestor, AncestorKey, mark_key
from pageferry.stores.manifests import StoredManifest, read_tail
from pageferry.stores.references import read_reference
from pageferry.stores.store import ObjectMissing, Store, StoredObject, gathered

log = getLogger(__name__)

RESOLUTION = timedelta(seconds=2)
"""Resolution of the times of a store, and a margin."""


@dataclass(slots=True)
class _Plan:
    """Decisions of a collection."""

    kept: list[StoredObject] = field(default_factory=list)
    recent: list[StoredObject] = field(default_factory=list)
    marked: list[StoredObject] = field(default_factory=list)
    """Unneeded objects whose marks are younger than the grace period."""
    unmarked: list[StoredObject] = field(default_factory=list)
    """Unneeded objects to mark."""
    expired: list[StoredObject] = field(default_factory=list)
    """Unneeded objects to delete."""
    obsolete: list[str] = field(default_factory=list)
    """Marks of objects that are needed, or that no longer exist."""


async def collect(store: Store, grace: float) -> GarbageCollected:
    """Collect the garbage of a store. `grace`: grace period, seconds.

    Raises ImageError, before anything is deleted, if a reference or a manifest that is needed cannot be read, and
    StoreError.
    """
    period = timedelta(seconds=grace) + RESOLUTION
    marks = {entry.key.removeprefix("condemned/"): entry for entry in await store.list("condemned")}
    objects = [*await store.list("manifests"), *await store.list("packs")]
    now = await _now(store)
    named, needed = await _needed(store, objects, now - period)
    plan = _plan(objects, marks, (named, needed), now - period)
    await gathered(store.put(mark_key(one.key), b"") for one in plan.unmarked)
    await store.sync()
    fault_point("store.marked")
    await store.remove_incomplete(now - period)
    left = [one.key for one in await store.list("checks") if one.modified < now - period]
    await gathered(store.delete(key) for key in left)
    await gathered(store.delete(one.key) for one in plan.expired)
    fault_point("store.swept")
    await gathered(store.delete(key) for key in (*(mark_key(one.key) for one in plan.expired), *plan.obsolete))
    condemned = plan.marked + plan.unmarked
    return GarbageCollected(
        store=str(store.url),
        kept=len(plan.kept),
        kept_bytes=sum(one.length for one in plan.kept),
        recent=len(plan.recent),
        condemned=len(condemned),
        condemned_bytes=sum(one.length for one in condemned),
        deleted=len(plan.expired),
        freed=sum(one.length for one in plan.expired),
    )


def _plan(
    objects: list[StoredObject], marks: dict[str, StoredObject], keys: tuple[set[str], set[str]], before: datetime
) -> _Plan:
    """Decide about every object. `keys`: keys of objects that references need, and of those that references or recent
    manifests need. `before`: time before which an object or a mark is older than the grace period.

    A mark of an object that only a recent manifest needs is kept: another collection may be about to delete the object,
    and the upload must find the mark.
    """
    plan, (named, needed) = _Plan(), keys
    existing = {one.key for one in objects}
    for one in objects:
        mark = marks.get(one.key)
        if one.key in needed:
            plan.kept.append(one)
        elif mark is not None:
            (plan.expired if mark.modified < before else plan.marked).append(one)
        else:
            (plan.unmarked if one.modified < before else plan.recent).append(one)
    plan.obsolete = [
        mark.key for key, mark in marks.items() if key in named or (key not in existing and mark.modified < before)
    ]
    return plan


async def _now(store: Store) -> datetime:
    """Return the time of the store, as the modification time of a new object."""
    key = f"condemned/clock-{os.urandom(8).hex()}"
    await store.put(key, b"")
    found = await store.find(key)
    await store.delete(key)
    if found is None:
        raise StoreError(f"cannot collect the garbage of {store.url}: another process has deleted {key}")
    return found.modified


@dataclass(frozen=True, slots=True)
class _Needs:
    """Objects that one image needs, without the contents of its manifest."""

    manifest: str
    keys: frozenset[str]
    ancestors: tuple[Ancestor | AncestorKey, ...]

    @classmethod
    def of(cls, manifest: StoredManifest) -> _Needs:
        return cls(manifest.key, frozenset(needs(manifest)), tuple(manifest.needed[1]))


async def _needed(store: Store, objects: list[StoredObject], recent_after: datetime) -> tuple[set[str], set[str]]:
    """Return the keys of all objects that references need, and of those that references or recent manifests need.

    Raises ImageError, StoreError.
    """
    lengths = {one.key: one.length for one in objects}
    known: dict[str, _Needs] = {}
    found = await gathered(_of_reference(store, entry) for entry in await store.list("images"))
    named = await _with_ancestors(store, found, known, lengths)
    uploads = [one for one in objects if one.modified >= recent_after and one.key.startswith("manifests/")]
    found = await gathered(_of_upload(store, entry) for entry in uploads if entry.key not in known)
    return named, named | await _with_ancestors(store, found, known, lengths)


async def _with_ancestors(
    store: Store, found: list[_Needs | None], known: dict[str, _Needs], lengths: dict[str, int]
) -> set[str]:
    """Return the keys of all objects that images and their ancestors need. Add the images to `known`."""
    images = [one for one in found if one is not None]
    known.update((one.manifest, one) for one in images)
    ancestors = {one.key: one for image in images for one in image.ancestors}
    missing = [one for key, one in ancestors.items() if key not in known]
    known.update((one.manifest, one) for one in await gathered(_of_ancestor(store, one, lengths) for one in missing))
    needing = [*images, *(known[key] for key in ancestors)]
    return {key for image in needing for key in image.keys}


async def _of_reference(store: Store, entry: StoredObject) -> _Needs | None:
    """Read the manifest of a named image. Return None if the image has just been deleted."""
    try:
        reference = await read_reference(store, entry.key.removeprefix("images/"))
    except ObjectMissing:
        return None
    except ImageError as error:
        raise _unknown(store, entry.key, error) from error
    try:
        return _Needs.of(await read_tail(store, reference.key, reference.manifest, reference.manifest_length))
    except ImageError as error:
        raise _unknown(store, entry.key, error) from error


async def _of_upload(store: Store, entry: StoredObject) -> _Needs | None:
    """Read a recent manifest. Return None if it cannot be read: no image can then be published with it."""
    try:
        return _Needs.of(await read_tail(store, entry.key, entry.key.rpartition("/")[2], entry.length))
    except ImageError as error:
        log.warning("%s: ignored: %s", entry.key, error)
        return None


async def _of_ancestor(store: Store, ancestor: Ancestor | AncestorKey, lengths: dict[str, int]) -> _Needs:
    """Read the manifest of an ancestor. `lengths`: lengths of the objects that were listed."""
    try:
        if (length := lengths.get(ancestor.key)) is None:
            if (entry := await store.find(ancestor.key)) is None:
                raise ObjectMissing(f"{ancestor.key} is missing")
            length = entry.length
        return _Needs.of(await read_tail(store, ancestor.key, ancestor.manifest, length))
    except ImageError as error:
        raise _unknown(store, ancestor.key, error) from error


def _unknown(store: Store, key: str, error: ImageError) -> ImageError:
    return ImageError(
        f"cannot collect the garbage of {store.url}: the objects that {key} needs are not known: {error}; delete the "
        "images that need it, or restore the object"
    )
