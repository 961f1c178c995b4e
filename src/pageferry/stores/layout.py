"""Layout of images in a store (docs/format.md, "Images in stores"): keys, references, manifests and marks.

::

    images/NAME               reference: names the manifest of an image; created last, exactly once
    manifests/ID/DIGEST       manifest of the image with this id: where its storage blocks are, and all other bytes
    packs/DIGEST              storage blocks of one or several images
    condemned/KEY             mark of the garbage collection: KEY is to be deleted
    checks/RANDOM             object of a check of permissions, deleted by the check or a garbage collection

An object is never replaced: manifests and packs contain random bytes, so that each upload has another digest.

The manifest of an encrypted image has an envelope instead of a directory: an outline, which garbage collections read
without a key, and the encrypted directory, which authenticates the outline.
"""

from __future__ import annotations

import os
import struct
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from pageferry.errors import ImageError
from pageferry.images.image import MAX_CHAIN
from pageferry.images.metadata import ImageIdentity
from pageferry.stores.library import digest

T = TypeVar("T")

VERSION = 1
MANIFEST_MAGIC = b"PFMANIF\n"
PACK_MAGIC = b"PFPACKS\n"
ENCRYPTED = 1
"""Feature: the storage blocks of a pack, and all parts of a manifest, are encrypted."""
FEATURES = ENCRYPTED
"""Bit set of supported features. A manifest or a pack with any other mandatory feature is refused."""

PACK_HEADER = struct.Struct("<8sHHI16s32x")
"""Header of a pack, 64 bytes: magic, version, 0, mandatory features, random bytes."""
TRAILER_HEAD = struct.Struct("<8sHHII12x")
"""First 32 bytes of the trailer of a manifest: magic, version, 0, mandatory features, length of the directory. The
remaining 32 bytes are the digest of the directory and this head."""
TRAILER = TRAILER_HEAD.size + 32

PACK_LENGTH = 32 << 20
"""Length from which on a pack is complete, bytes."""
MAX_PACK = 64 << 20
MAX_MANIFEST = 1 << 30
MAX_MANIFESTS = 2 << 30
"""Maximum length of the manifests of an image and its ancestors together, bytes. They are read into memory."""
MAX_DIRECTORY = 64 << 20
MAX_ENTRIES = 1 << 20
"""Maximum number of packs, and of chunks, of an image."""
MAX_REFERENCE = 64 << 10
MAX_TIME = 250_000_000_000
"""Latest time of a snapshot point, seconds since 1970: before the year 9999."""
MAX_LENGTH = 1 << 48
"""Maximum size of an image file, bytes."""

_Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Hex = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Id = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
_Digest = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
_Offset = Annotated[int, Meta(ge=0, le=MAX_LENGTH)]
_FileName = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^/\x00]*$")]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Range of a manifest object."""

    offset: _Offset
    length: _Offset
    digest: _Hash
    """Digest of the stored bytes."""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of the image file that are not in a storage block. Chunks are stored one after the other."""

    offset: _Offset
    """Offset in the image file, bytes."""
    length: Annotated[int, Meta(gt=0, le=1 << 20)]
    """Length before compression, bytes."""
    stored: Annotated[int, Meta(gt=0, le=2 << 20)]
    """Length in the manifest, bytes."""
    form: Annotated[int, Meta(ge=0, le=2)]
    """0: as it is; 1: zlib; 2: transposed records of 16 bytes, zlib."""


class PackEntry(msgspec.Struct, frozen=True, array_like=True):
    """Pack that the manifest refers to."""

    digest: _Hash
    length: Annotated[int, Meta(gt=0, le=MAX_PACK)]

    @property
    def key(self) -> str:
        """Key of the pack."""
        return pack_key(self.digest)


class Ancestor(msgspec.Struct, frozen=True, kw_only=True):
    """Image that the pages of this image refer to."""

    id: _Id
    digest: _Digest
    manifest: _Hex
    """Digest of its manifest."""
    name: _FileName
    """Name of the file in which its child expects it."""

    @property
    def identity(self) -> ImageIdentity:
        """Identity of the image."""
        return ImageIdentity(id=self.id, digest=self.digest)

    @property
    def key(self) -> str:
        """Key of its manifest."""
        return manifest_key(self.id, self.manifest)


class Directory(msgspec.Struct, frozen=True, kw_only=True):
    """Directory of a manifest. Readers ignore unknown fields."""

    random: Annotated[bytes, Meta(min_length=16, max_length=16)]
    id: _Id
    digest: _Digest
    """Checksum of the footer of the image file."""
    length: _Offset
    """Size of the image file, bytes."""
    packs: Annotated[list[PackEntry], Meta(max_length=MAX_ENTRIES)]
    blocks: Part
    """Table of the storage blocks, compressed with zlib."""
    count: Annotated[int, Meta(ge=0, le=1 << 32)]
    """Number of storage blocks."""
    frame: Part
    """Contents of all chunks."""
    chunks: Annotated[list[Chunk], Meta(max_length=MAX_ENTRIES)]
    ancestors: Annotated[list[Ancestor], Meta(max_length=MAX_CHAIN - 1)]
    """Ancestors of the image, parent first."""

    @property
    def identity(self) -> ImageIdentity:
        """Identity of the image."""
        return ImageIdentity(id=self.id, digest=self.digest)


class AncestorKey(msgspec.Struct, frozen=True, array_like=True):
    """Manifest of an ancestor, in an outline."""

    id: _Id
    manifest: _Hex

    @property
    def key(self) -> str:
        """Key of the manifest."""
        return manifest_key(self.id, self.manifest)


class WrappedKey(msgspec.Struct, frozen=True, kw_only=True):
    """Key of a domain, encrypted for the users who may read the image (`keys`)."""

    domain: _Hash
    """Commitment to the key (`sealing.Domain.id`)."""
    recipients: _Hash
    """Keyed digest of the set of recipients."""
    form: Literal["age", "raw"]
    wrapped: Annotated[bytes, Meta(max_length=64 << 10)]
    proofs: Annotated[list[_Hash], Meta(max_length=64)]
    """Codes by which the identities of the writer authenticate the domain; empty for a raw key."""


class Outline(msgspec.Struct, frozen=True, kw_only=True):
    """Readable part of the manifest of an encrypted image: what garbage collections need, and the wrapped key."""

    salt: _Hash
    """Random bytes, from which the keys of this manifest are derived."""
    id: _Id
    packs: Annotated[list[PackEntry], Meta(max_length=MAX_ENTRIES)]
    ancestors: Annotated[list[AncestorKey], Meta(max_length=MAX_CHAIN - 1)]
    table: _Offset
    """Offset of the block table in the manifest, bytes."""
    key: WrappedKey


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """Directory of the manifest of an encrypted image, as it is stored."""

    outline: bytes
    """Outline, MessagePack: associated data of the directory."""
    directory: bytes
    """Directory, MessagePack, encrypted."""

    def decoded(self, where: str) -> Outline:
        """Return the outline. `where`: URL of the manifest, for messages. Raises ImageError."""
        return _decode(self.outline, Outline, where)


class About(msgspec.Struct, frozen=True, kw_only=True):
    """Description of an encrypted image, in its reference."""

    digest: _Digest
    kind: str
    workload: str
    created: Annotated[float, Meta(ge=0, le=MAX_TIME)]


class Reference(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """Contents of `images/NAME`, as JSON. Only `manifest` and `id` locate the image; the other fields describe it in
    listings. Of an encrypted image, `digest`, `kind`, `workload` and `created` have the values of `HIDDEN`."""

    format: Literal["pageferry-image"]
    version: int
    manifest: _Hex
    manifest_length: Annotated[int, Meta(gt=0, le=MAX_MANIFEST)]
    id: _Id
    digest: _Digest
    kind: str
    workload: str
    created: Annotated[float, Meta(ge=0, le=MAX_TIME)]
    """Time of the snapshot point, seconds since 1970."""
    length: _Offset
    """Size of the image file, bytes."""
    parents: int
    """Number of ancestors."""
    sealed: Annotated[bytes, Meta(max_length=MAX_REFERENCE)] = b""
    """Description of an encrypted image (`About`), encrypted; empty for an image that is not encrypted."""
    salt: Annotated[bytes, Meta(max_length=64)] = b""
    """Random bytes, from which the key of `sealed` is derived."""

    @property
    def key(self) -> str:
        """Key of the manifest."""
        return manifest_key(self.id, self.manifest)

    @property
    def identity(self) -> ImageIdentity:
        """Identity of the image."""
        return ImageIdentity(id=self.id, digest=self.digest)


HIDDEN = About(digest="0" * 16, kind="encrypted", workload="", created=0.0)
"""Description in the readable part of the reference of an encrypted image."""


def reference_key(name: str) -> str:
    """Return the key of the reference of an image."""
    return f"images/{name}"


def manifest_key(image_id: str, manifest: str) -> str:
    """Return the key of a manifest. `manifest`: digest, hexadecimal."""
    return f"manifests/{image_id}/{manifest}"


def pack_key(pack: bytes) -> str:
    """Return the key of a pack."""
    return f"packs/{pack.hex()}"


def mark_key(key: str) -> str:
    """Return the key of the mark of a condemned object."""
    return f"condemned/{key}"


def new_pack(features: int) -> bytearray:
    """Return a pack without blocks."""
    return bytearray(PACK_HEADER.pack(PACK_MAGIC, VERSION, 0, features, os.urandom(16)))


def encode_manifest(parts: bytes, directory: Directory | Envelope) -> tuple[bytes, str]:
    """Return a manifest and its digest. `parts`: contents that the directory refers to."""
    encoded = msgspec.msgpack.encode(directory)
    features = ENCRYPTED if isinstance(directory, Envelope) else 0
    head = TRAILER_HEAD.pack(MANIFEST_MAGIC, VERSION, 0, features, len(encoded))
    found = digest(encoded + head)
    return b"".join((parts, encoded, head, found)), found.hex()


def decode_manifest(contents: bytes, manifest: str, where: str) -> Directory | Envelope:
    """Verify the trailer and the directory of a manifest, and return the directory, or the envelope of an encrypted
    one. `manifest`: expected digest, hexadecimal; `where`: its URL, for messages. Raises ImageError."""
    trailer = contents[-TRAILER:]
    if len(trailer) < TRAILER or not trailer.startswith(MANIFEST_MAGIC):
        raise ImageError(f"cannot read {where}: it is not a manifest of pageferry, or is truncated")
    _, version, _, features, length = TRAILER_HEAD.unpack_from(trailer)
    _check_version(where, version, features)
    if length > min(MAX_DIRECTORY, len(contents) - TRAILER):
        raise ImageError(f"cannot read {where}: its directory is truncated")
    signed = contents[len(contents) - TRAILER - length : len(contents) - 32]
    if digest(signed).hex() != manifest or trailer[-32:].hex() != manifest:
        raise ImageError(f"cannot read {where}: its contents do not match its digest: it was damaged or replaced")
    if features & ENCRYPTED:
        return _decode(signed[:length], Envelope, where)
    return decode_directory(signed[:length], where)


def decode_directory(encoded: bytes, where: str) -> Directory:
    """Parse a directory. Raises ImageError."""
    return _decode(encoded, Directory, where)


def _decode(encoded: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.msgpack.decode(encoded, type=kind)
    except msgspec.MsgspecError as error:
        raise ImageError(f"cannot read {where}: its directory is invalid ({error})") from error


def tail_length(tail: bytes, length: int) -> int:
    """Return the length of the directory and the trailer of a manifest of `length` bytes, from its last bytes."""
    if len(tail) < TRAILER:
        return length
    return min(int(TRAILER_HEAD.unpack_from(tail[-TRAILER:])[4]), MAX_DIRECTORY) + TRAILER


def part_of(contents: bytes, part: Part, where: str, first: int = 0) -> memoryview:
    """Return a verified part of a manifest. `first`: offset of `contents` in the manifest. Raises ImageError."""
    start = max(part.offset - first, 0)
    found = memoryview(contents)[start : start + part.length]
    if len(found) != part.length or digest(found) != part.digest:
        raise ImageError(f"cannot read {where}: a part is damaged or truncated")
    return found


def decode_reference(contents: bytes, where: str) -> Reference:
    """Parse a reference. `where`: its URL, for messages. Raises ImageError."""
    try:
        found = msgspec.json.decode(contents, type=Reference)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ImageError(f"cannot read {where}: it is not a reference to an image ({error})") from error
    _check_version(where, found.version, 0)
    return found


def _check_version(where: str, version: int, features: int) -> None:
    if version != VERSION:
        raise ImageError(
            f"cannot read {where}: unsupported version {version}, this pageferry supports {VERSION}; use the release "
            "that wrote it"
        )
    if unknown := features & ~FEATURES:
        raise ImageError(f"cannot read {where}: unsupported features {unknown:#x}; use the release that wrote it")
