"""Manifests in a store: reading, verification and encryption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from pageferry.errors import ImageError
from pageferry.host.blocking import in_thread
from pageferry.stores import blocks, layout
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.keys import Access, Keys
from pageferry.stores.layout import (
    Ancestor,
    AncestorKey,
    Directory,
    Envelope,
    Outline,
    PackEntry,
    Part,
    WrappedKey,
)
from pageferry.stores.sealing import PLAIN, Domain, Sealing
from pageferry.stores.store import REQUESTS, Budget, Store, gathered

TAIL = 1 << 20
"""Bytes that are read first from the end of a manifest."""
PART = 256 << 10
"""Length of a manifest up to which it is read by one request, bytes."""
DIRECTORY, TABLE, FRAME = b"directory", b"table", b"frame"
"""Labels of the parts of an encrypted manifest (`sealing`)."""


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """Manifest of an image, verified but not decrypted."""

    key: str
    digest: str
    contents: bytes
    body: Directory | Envelope
    """Directory, or the envelope of an encrypted manifest."""
    where: str
    """URL, for messages."""
    first: int = 0
    """Offset of `contents` in the manifest, bytes."""

    @property
    def outline(self) -> Outline | None:
        """Readable part of an encrypted manifest; None if the manifest is not encrypted. Raises ImageError."""
        return self.body.decoded(self.where) if isinstance(self.body, Envelope) else None

    @property
    def domain(self) -> bytes:
        """Identifier of the key domain; empty if the manifest is not encrypted. Raises ImageError."""
        outline = self.outline
        return outline.key.domain if outline is not None else b""

    @property
    def needed(self) -> tuple[list[PackEntry], Sequence[Ancestor | AncestorKey]]:
        """Packs and ancestors, which are readable without a key. Raises ImageError."""
        if isinstance(self.body, Directory):
            return self.body.packs, self.body.ancestors
        outline = self.body.decoded(self.where)
        return outline.packs, outline.ancestors

    def open(self, access: Access, what: str, *, pinned: bool = True) -> Manifest:
        """Decrypt the directory. `what`: description of the image, for messages; `pinned`: whether the digest is from a
        trusted source, such as the user.

        Raises WrongKey, ImageError.
        """
        if (outline := self.outline) is None:
            access.check_plain(what)
            return self.open_in(PLAIN)
        domain = access.unwrap(outline.key, what)
        if not pinned:
            access.check_authentic(outline.key, what)
        return self.open_in(domain)

    def open_in(self, sealing: Sealing) -> Manifest:
        """Decrypt the directory with the sealing of another manifest, such as that of a child. Raises ImageError if the
        manifest belongs to another key domain, or is damaged."""
        if self.domain != sealing.domain:
            raise ImageError(f"cannot read {self.where}: it belongs to another key domain than the image")
        directory, salt = self.body, b""
        if isinstance(directory, Envelope):
            directory, salt = self._decrypted(directory, sealing)
        return Manifest(self.key, self.digest, self.contents, directory, self.where, self.first, sealing, salt)

    def _decrypted(self, envelope: Envelope, sealing: Sealing) -> tuple[Directory, bytes]:
        """Return the directory and the salt of an encrypted manifest. Raises ImageError."""
        outline = envelope.decoded(self.where)
        opened = sealing.open_part(outline.salt, DIRECTORY, envelope.directory, envelope.outline)
        if opened is None:
            raise ImageError(f"cannot read {self.where}: it was changed: its directory cannot be decrypted")
        directory = layout.decode_directory(bytes(opened), self.where)
        if outline_of(directory, outline.salt, outline.key) != outline:
            raise ImageError(f"cannot read {self.where}: its outline is not that of its directory")
        return directory, outline.salt


@dataclass(frozen=True, slots=True)
class Manifest:
    """Manifest of an image, in memory. The parts other than the directory are decrypted when they are used."""

    key: str
    digest: str
    contents: bytes
    directory: Directory
    where: str
    """URL, for messages."""
    first: int = 0
    """Offset of `contents` in the manifest, bytes."""
    sealing: Sealing = PLAIN
    salt: bytes = b""
    """Random bytes, from which the keys of an encrypted manifest are derived."""

    @property
    def needed(self) -> tuple[list[PackEntry], Sequence[Ancestor | AncestorKey]]:
        """Packs and ancestors."""
        return self.directory.packs, self.directory.ancestors

    def records(self) -> list[BlockRecord]:
        """Verify and return the table of storage blocks. Raises ImageError."""
        directory = self.directory
        lengths = [pack.length for pack in directory.packs]
        sealed = blocks.SEALED if self.sealing.domain else 0
        try:
            blocks.check_count(directory.count, directory.blocks.length)
            table = self._part(directory.blocks, TABLE)
            return blocks.decode_table(table, directory.count, lengths, directory.length, sealed)
        except ImageError as error:
            raise ImageError(f"cannot read {self.where}: {error}") from error

    def frame(self) -> memoryview:
        """Verify and return the stored frame. Raises ImageError."""
        return self._part(self.directory.frame, FRAME)

    def _part(self, part: Part, label: bytes) -> memoryview:
        stored = layout.part_of(self.contents, part, self.where, self.first)
        if (found := self.sealing.open_part(self.salt, label, stored)) is None:
            raise ImageError(f"cannot read {self.where}: a part cannot be decrypted")
        return found


def outline_of(directory: Directory, salt: bytes, key: WrappedKey) -> Outline:
    """Return the readable part of the manifest of an encrypted image."""
    return Outline(
        salt=salt,
        id=directory.id,
        packs=directory.packs,
        ancestors=[AncestorKey(one.id, one.manifest) for one in directory.ancestors],
        table=directory.blocks.offset,
        key=key,
    )


def sealed(directory: Directory, salt: bytes, domain: Sealing, keys: Keys) -> Envelope:
    """Encrypt a directory. `keys`: keys that wrap the key of the domain."""
    assert isinstance(domain, Domain)
    outline = msgspec.msgpack.encode(outline_of(directory, salt, keys.wrap(domain)))
    contents = msgspec.msgpack.encode(directory)
    return Envelope(outline=outline, directory=domain.seal_part(salt, DIRECTORY, contents, outline))


async def read_manifest(
    store: Store, key: str, manifest: str, length: int = 0, budget: Budget | None = None
) -> StoredManifest:
    """Read and verify a manifest. `manifest`: its digest, hexadecimal; `length`: its length, if it is known: a long one
    is then read by several requests at a time, because each connection is slow at first. `budget`: memory for it and
    other manifests. Raises ImageError, ObjectMissing, StoreError."""
    where = f"{store.url}/{key}"
    if length > PART:
        if budget is not None:
            budget.take(length, where)
        size = max(PART, -(-length // REQUESTS))
        starts = range(0, length, size)
        parts = await gathered(store.get_range(key, start, min(size, length - start)) for start in starts)
        contents = b"".join(parts)
    else:
        contents = await store.get(key, layout.MAX_MANIFEST, budget)
    body = await in_thread(layout.decode_manifest, contents, manifest, where)
    return StoredManifest(key, manifest, contents, body, where)


async def read_tail(store: Store, key: str, manifest: str, length: int, budget: Budget | None = None) -> StoredManifest:
    """Read and verify the end of a manifest of `length` bytes: its directory, and the table of storage blocks. The
    frame is in the contents only if the manifest is short. `budget`: memory for it and other manifests.

    Raises ImageError, ObjectMissing, StoreError.
    """
    where, size = f"{store.url}/{key}", min(length, TAIL)
    if not layout.TRAILER <= length <= layout.MAX_MANIFEST:
        raise ImageError(f"cannot read {where}: it has {length} bytes, so it is not a manifest, or is truncated")
    while True:
        contents = bytes(await store.get_range(key, length - size, size))
        needed = layout.tail_length(contents, length)
        if size >= min(needed, length):
            break
        size = min(needed, length)
    body = await in_thread(layout.decode_manifest, contents, manifest, where)
    table = body.blocks.offset if isinstance(body, Directory) else body.decoded(where).table
    needed = length - table
    plain = body if isinstance(body, Directory) else None
    if needed < 0 or (plain is not None and plain.blocks.length > plain.count * blocks.RECORD.size + TAIL):
        raise ImageError(f"cannot read {where}: its table of storage blocks has an invalid length")
    if budget is not None:
        budget.take(max(needed, size), where)
    if needed > size:
        contents = bytes(await store.get_range(key, table, needed))
    return StoredManifest(key, manifest, contents, body, where, length - len(contents))
