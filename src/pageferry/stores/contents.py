"""Contents of a store that uploads can reuse: storage blocks and manifests that no garbage collection deletes.

Packs that are missing or truncated are not reused. Damage inside a pack is only found by downloads.

An encrypted upload continues the key domain of the image that was published last, among those that were encrypted with
one of its secret keys, for the same recipients. Otherwise, it begins a new domain. Blocks of other domains, and those
of images that are not encrypted, are not reused.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import getLogger

from pageferry.errors import ImageError
from pageferry.host.blocking import in_thread
from pageferry.images.metadata import ImageIdentity
from pageferry.stores import layout
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.keys import Keys
from pageferry.stores.layout import Ancestor, PackEntry
from pageferry.stores.manifests import Manifest, StoredManifest, read_tail
from pageferry.stores.references import read_reference
from pageferry.stores.sealing import PLAIN, Domain, Sealing
from pageferry.stores.store import Budget, Store, StoredObject, gathered

log = getLogger(__name__)

MAX_SOURCES = 64
"""Number of images, those published last, whose storage blocks are reused."""
MAX_PLACES = 1 << 20
"""Maximum number of storage blocks that are kept in memory for reuse: images of 1 TiB in all."""
CHECK_AFTER = 300.0
"""Age of the knowledge after which an upload also checks that objects exist, seconds. It is shorter than any grace
period (`options.MIN_GRACE`)."""


@dataclass(slots=True)
class Contents:
    """Reusable contents of a store, at the time at which they were read."""

    store: Store
    condemned: set[str]
    """Keys of objects that a garbage collection has marked."""
    packs: dict[str, int]
    """Lengths of the packs in the store, by their keys; empty if the upload is to reuse nothing."""
    sealing: Sealing = PLAIN
    """Sealing of the upload, and of all contents that it reuses."""
    places: dict[bytes, tuple[PackEntry, int]] = field(default_factory=dict)
    """Pack and offset of storage blocks, by their digest."""
    read_at: float = 0.0
    """Time before the marks were read, of `time.monotonic`."""

    @classmethod
    async def read(
        cls, store: Store, *, reuse: bool, keys: Keys | None = None, domain: Domain | None = None
    ) -> Contents:
        """Read the marks, and the manifests of the images that were published last. Without `reuse`, nothing is found.
        `keys`: keys with which the upload is encrypted; None if it is not. `domain`: key domain to continue if the
        store has none of these keys; None for a new one.

        Raises StoreError.
        """
        begin = time.monotonic()
        self = cls(store, await condemned_keys(store), {}, read_at=begin)
        found: list[StoredManifest] = []
        if reuse or keys is not None:
            entries = sorted(await store.list("images"), key=lambda entry: entry.modified)
            budget = Budget(layout.MAX_MANIFESTS)
            read = await gathered(self._manifest(entry, budget) for entry in entries[: -MAX_SOURCES - 1 : -1])
            found = [one for one in reversed(read) if one is not None]
        if keys is not None:
            continued: Domain | None = await in_thread(_domain, found, keys)
            self.sealing = continued or domain or Domain.create()
        if reuse:
            self.packs = {entry.key: entry.length for entry in await store.list("packs")}
            for manifest in found:  # one after the other: a table in memory is large
                await in_thread(self._add_image, manifest)
        return self

    async def find(self, identity: ImageIdentity, ancestors: list[Ancestor]) -> Manifest | None:
        """Return a manifest of an image that refers to these manifests of its ancestors, and is not condemned, with
        all that it needs. Raises StoreError."""
        if not self.packs:
            return None
        for entry in await self.store.list(f"manifests/{identity.id}"):
            try:
                stored = await read_tail(self.store, entry.key, entry.key.rpartition("/")[2], entry.length)
                if stored.domain != self.sealing.domain:
                    continue
                manifest = await in_thread(stored.open_in, self.sealing)
            except ImageError as error:
                log.warning("%s: uploading another manifest: %s", entry.key, error)
                continue
            found = manifest.directory
            if (found.identity, found.ancestors) != (identity, ancestors) or self.condemned & needs(manifest):
                continue
            if all(map(self._usable, found.packs)):
                return manifest
        return None

    def add_packs(self, packs: Iterable[tuple[PackEntry, list[tuple[bytes, int]]]]) -> None:
        """Add packs with the address and the offset of each of their storage blocks."""
        for pack, placed in packs:
            if pack.key not in self.condemned and self._usable(pack) and len(self.places) < MAX_PLACES:
                for block, start in placed:
                    self.places.setdefault(block, (pack, start))

    def add(self, manifest: Manifest) -> None:
        """Add the storage blocks of an image, unless it belongs to another key domain. Raises ImageError."""
        if manifest.sealing.domain == self.sealing.domain:
            self._add(manifest.directory.packs, manifest.records())

    async def unavailable(self, keys: set[str]) -> set[str]:
        """Return those of the objects that are condemned now, or were deleted. Raises StoreError.

        A collection deletes an object only if its mark is older than the grace period. Without a mark now, an object
        exists for at least that long, if it exists. A mark that was set and removed since `read_at` is older than the
        grace period, which is longer than `CHECK_AFTER`.
        """
        found = keys & await condemned_keys(self.store)
        if time.monotonic() - self.read_at > CHECK_AFTER:
            existing = [*await self.store.list("packs"), *await self.store.list("manifests")]
            found |= keys - {entry.key for entry in existing}
        return found

    async def _manifest(self, entry: StoredObject, budget: Budget) -> StoredManifest | None:
        """Read the end of the manifest of a named image. Return None if it cannot be read, or if it exceeds the budget:
        it is only an optimisation."""
        try:
            reference = await read_reference(self.store, entry.key.removeprefix("images/"))
            return await read_tail(self.store, reference.key, reference.manifest, reference.manifest_length, budget)
        except ImageError as error:
            log.info("%s: its storage blocks are not reused: %s", entry.key, error)
            return None

    def _add_image(self, manifest: StoredManifest) -> None:
        """Add the storage blocks of a named image. Add none if they cannot be read, or if there are too many: they are
        only an optimisation."""
        try:
            if manifest.domain == self.sealing.domain:
                opened = manifest.open_in(self.sealing)
                if opened.directory.count <= MAX_PLACES:
                    self.add(opened)
        except ImageError as error:
            log.info("%s: its storage blocks are not reused: %s", manifest.key, error)

    def _usable(self, pack: PackEntry) -> bool:
        """Return whether the store has the pack, as long as it should be."""
        return self.packs.get(pack.key) == pack.length

    def _add(self, packs: list[PackEntry], records: list[BlockRecord]) -> None:
        usable = [pack.key not in self.condemned and self._usable(pack) for pack in packs]
        for record in records:
            if len(self.places) >= MAX_PLACES:
                return
            if usable[record.pack]:
                self.places.setdefault(record.digest, (packs[record.pack], record.start))


async def condemned_keys(store: Store) -> set[str]:
    """Return the keys of all objects that are marked by a garbage collection. Raises StoreError."""
    return {entry.key.removeprefix("condemned/") for entry in await store.list("condemned")}


def needs(manifest: StoredManifest | Manifest) -> set[str]:
    """Return the keys of a manifest, of its packs, and of the manifests of its ancestors. Raises ImageError."""
    packs, ancestors = manifest.needed
    return {manifest.key, *(pack.key for pack in packs), *(one.key for one in ancestors)}


def _domain(found: list[StoredManifest], keys: Keys) -> Domain | None:
    """Return the key domain that an upload continues; None if there is none. `found`: manifests in the store, in the
    order of their publication."""
    for manifest in reversed(found):
        try:
            outline = manifest.outline
        except ImageError as error:
            log.info("%s: its key domain is not continued: %s", manifest.key, error)
            continue
        if outline is not None and (domain := keys.continued(outline.key)) is not None:
            return domain
    return None


def ancestor_of(manifest: Manifest, name: str) -> Ancestor:
    """Return the entry for the directory of a child. `name`: name of the file in which the child expects the image."""
    found = manifest.directory
    return Ancestor(id=found.id, digest=found.digest, manifest=manifest.digest, name=name)
