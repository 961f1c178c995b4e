"""References and manifests in a store: reading, listing and removal."""

from __future__ import annotations

import os
import time

import msgspec

from pageferry.errors import ImageError, WrongKey
from pageferry.host.blocking import in_thread
from pageferry.images.metadata import ImageIdentity
from pageferry.stores import blocks, layout
from pageferry.stores.address import ImageUrl
from pageferry.stores.events import StoredImage, StoreListing
from pageferry.stores.keys import Access
from pageferry.stores.layout import (
    About,
    Reference,
)
from pageferry.stores.manifests import Manifest, StoredManifest, read_manifest, read_tail
from pageferry.stores.sealing import KEY, PLAIN, Domain, Sealing
from pageferry.stores.store import Budget, ObjectMissing, Store, StoredObject, gathered

LABEL = b"reference"
"""Label of the description of an encrypted image (`sealing`)."""


async def identity(store: Store, url: ImageUrl, reference: Reference, access: Access) -> ImageIdentity | None:
    """Return the identity of an image; None if it is not encrypted for exactly the recipients of the keys, or if they
    do not open it. Raises ImageError, StoreError.
    """
    if access.keys is None:
        return None if reference.sealed else reference.identity
    tail = await read_tail(store, reference.key, reference.manifest, reference.manifest_length)
    try:
        manifest = opened(tail, url, reference, Access(access.keys))
    except WrongKey:
        return None
    outline, domain = tail.outline, manifest.sealing
    assert outline is not None
    assert isinstance(domain, Domain)
    return manifest.directory.identity if access.keys.same_recipients(outline.key, domain) else None


async def read_reference(store: Store, name: str) -> Reference:
    """Read the reference of an image. Raises ImageError, ObjectMissing, StoreError."""
    key = layout.reference_key(name)
    return layout.decode_reference(await store.get(key, layout.MAX_REFERENCE), f"{store.url}/{key}")


async def find_reference(store: Store, name: str) -> Reference | None:
    """Read the reference of an image, or return None if there is none."""
    try:
        return await read_reference(store, name)
    except ObjectMissing:
        return None


async def resolve(store: Store, url: ImageUrl) -> Reference:
    """Read the reference of an image. Raises ImageError if there is none, or if it names another manifest than the URL,
    StoreError."""
    try:
        reference = await read_reference(store, url.name)
    except ObjectMissing as error:
        raise ObjectMissing(
            f"cannot find {url}: the store has no image of this name; `pageferry image list {url.store}` lists images"
        ) from error
    if url.manifest not in (None, reference.manifest):
        raise ImageError(
            f"cannot read {url}: its manifest has the digest {reference.manifest}, not {url.manifest}: the name was "
            "used again, or set to an older image"
        )
    return reference


async def open_image(store: Store, url: ImageUrl, access: Access) -> tuple[Reference, list[Manifest]]:
    """Read the manifests of an image and of its ancestors, image first. Raises ImageError, StoreError, WrongKey."""
    reference = await resolve(store, url)
    return reference, await open_manifests(store, url, reference, access)


async def open_manifests(store: Store, url: ImageUrl, reference: Reference, access: Access) -> list[Manifest]:
    """Read the manifest to which a reference refers, and those of its ancestors, image first. Raises ImageError,
    StoreError, WrongKey."""
    budget = Budget(layout.MAX_MANIFESTS)
    try:
        stored = await read_manifest(store, reference.key, reference.manifest, reference.manifest_length, budget)
    except ObjectMissing as error:
        raise ImageError(f"cannot read {url}: its manifest is missing: {error}") from error
    manifest = await in_thread(lambda: opened(stored, url, reference, access))
    reads = [read_manifest(store, one.key, one.manifest, budget=budget) for one in manifest.directory.ancestors]
    ancestors = [await in_thread(one.open_in, manifest.sealing) for one in await gathered(reads)]
    if (count := sum(one.directory.count for one in (manifest, *ancestors))) > blocks.MAX_BLOCKS:
        raise ImageError(
            f"cannot read {url}: it and its ancestors have {count} storage blocks, expected at most {blocks.MAX_BLOCKS}"
        )
    for expected, found in zip(manifest.directory.ancestors, ancestors, strict=True):
        if found.directory.identity != expected.identity:
            raise ImageError(f"cannot read {url}: the manifest of its parent {expected.name} is that of another image")
    return [manifest, *ancestors]


async def open_described(store: Store, url: ImageUrl, access: Access) -> tuple[About, list[Manifest], Domain | None]:
    """Read the manifests of an image and of its ancestors, image first, with its description. Return also its key
    domain if the image is encrypted for exactly the recipients of the keys, by a user with one of these secret keys.
    Raises ImageError, StoreError, WrongKey."""
    reference, manifests = await open_image(store, url, access)
    about, domain, first = describe(reference, url.name, manifests[0].sealing), None, manifests[0]
    assert about is not None, "`opened` has checked it"
    body = await in_thread(layout.decode_manifest, first.contents, first.digest, first.where)
    outline = StoredManifest(first.key, first.digest, first.contents, body, first.where).outline
    if access.keys is not None and outline is not None:
        domain = access.keys.continued(outline.key)
    return about, manifests, domain


async def prove_access(store: Store, url: ImageUrl, access: Access) -> tuple[Reference, bool]:
    """Check that the keys open an image, or that no key is needed, by its reference and the end of its manifest. Return
    the reference, and whether the image is encrypted. Raises ImageError, StoreError, WrongKey."""
    reference = await resolve(store, url)
    if access.keys is None and not reference.sealed:
        return reference, False
    try:
        tail = await read_tail(store, reference.key, reference.manifest, reference.manifest_length)
    except ObjectMissing as error:
        raise ImageError(f"cannot read {url}: its manifest is missing: {error}") from error
    manifest = await in_thread(lambda: opened(tail, url, reference, access))
    return reference, bool(manifest.sealing.domain)


def opened(stored: StoredManifest, url: ImageUrl, reference: Reference, access: Access) -> Manifest:
    """Open the manifest of an image, and verify that the reference is that of this name and this manifest.

    Raises ImageError, WrongKey.
    """
    manifest = stored.open(access, str(url), pinned=url.manifest is not None)
    about = describe(reference, url.name, manifest.sealing)
    if about is None:
        raise ImageError(
            f"cannot read {url}: its reference was changed, or is that of another name; the manifest is {stored.key}"
        )
    identity = ImageIdentity(id=reference.id, digest=about.digest)
    if manifest.directory.identity != identity:
        raise ImageError(f"cannot read {url}: its manifest is that of another image")
    return manifest


def seal_reference(reference: Reference, name: str, sealing: Sealing) -> Reference:
    """Return the reference of an image as it is published under a name."""
    if not sealing.domain:
        return reference
    about = About(digest=reference.digest, kind=reference.kind, workload=reference.workload, created=reference.created)
    hidden = msgspec.structs.replace(reference, **msgspec.structs.asdict(layout.HIDDEN), salt=os.urandom(KEY))
    contents = msgspec.msgpack.encode(about)
    sealed = sealing.seal_part(hidden.salt, LABEL, contents, _bound(hidden, name))
    return msgspec.structs.replace(hidden, sealed=sealed)


def describe(reference: Reference, name: str, sealing: Sealing) -> About | None:
    """Return the description of an image; None if the reference is not that of this name and of this key domain."""
    if not sealing.domain:
        found = About(
            digest=reference.digest, kind=reference.kind, workload=reference.workload, created=reference.created
        )
        return None if reference.sealed else found
    contents = sealing.open_part(reference.salt, LABEL, reference.sealed, _bound(reference, name))
    try:
        return None if contents is None else msgspec.msgpack.decode(contents, type=About)
    except msgspec.MsgspecError:
        return None


def _bound(reference: Reference, name: str) -> bytes:
    """Return the associated data of a description: the name, and the readable fields of the reference."""
    found = reference
    return msgspec.msgpack.encode([name, found.manifest, found.manifest_length, found.id, found.length, found.parents])


async def list_images(store: Store, access: Access) -> StoreListing:
    """List the images of a store. Encrypted images that the keys open are described. Raises StoreError."""
    entries = await store.list("images")
    found = await gathered(_describe(store, entry, access) for entry in entries)
    return StoreListing(
        store=str(store.url),
        images=[one for one in found if isinstance(one, StoredImage)],
        unreadable=[one for one in found if isinstance(one, str)],
    )


async def delete_reference(store: Store, url: ImageUrl) -> None:
    """Delete the reference of an image. Its manifest and packs remain until garbage collections delete them.

    Raises ImageError if there is no such image, or if the URL names another manifest, StoreError.
    """
    key = layout.reference_key(url.name)
    if url.manifest is not None:
        await resolve(store, url)
    if await store.find(key) is None:
        raise ImageError(f"cannot delete {url}: the store has no image of this name")
    await store.delete(key)


async def _describe(store: Store, entry: StoredObject, access: Access) -> StoredImage | str | None:
    """Return the description of an image, a reason why there is none, or None if the image has just been deleted."""
    name = entry.key.removeprefix("images/")
    try:
        found = await read_reference(store, name)
        about = await _about(store, found, name, access)
    except ObjectMissing:
        return None
    except ImageError as error:
        return str(error)
    return StoredImage(
        name=name,
        url=f"{store.url}/{name}",
        manifest=found.manifest,
        id=found.id,
        digest=about.digest if about is not None else None,
        kind=about.kind if about is not None else None,
        workload=about.workload if about is not None else None,
        created=_time_text(time.gmtime(about.created)) if about is not None else None,
        pushed=_time_text(entry.modified.utctimetuple()),
        length=found.length,
        parents=found.parents,
        encrypted=bool(found.sealed),
    )


async def _about(store: Store, reference: Reference, name: str, access: Access) -> About | None:
    """Return the description of an image; None if the keys do not open it. Raises ImageError, ObjectMissing."""
    if not reference.sealed:
        return describe(reference, name, PLAIN)
    if access.keys is None:
        return None
    tail = await read_tail(store, reference.key, reference.manifest, reference.manifest_length)
    try:
        manifest = await in_thread(lambda: tail.open(access, f"{store.url}/{name}"))
    except WrongKey:
        return None
    if (about := describe(reference, name, manifest.sealing)) is None:
        raise ImageError(f"cannot read {store.url}/{layout.reference_key(name)}: it was changed, or renamed")
    return about


def _time_text(value: time.struct_time) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", value)
