"""What an image says about itself besides pages: the sections that the engine does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pageferry.errors import ImageError
from pageferry.memory.regions import Identity
from pageferry.memory.view import Extent

METADATA = 16
"""Section: `Metadata`, as MessagePack."""
STATE = 17
"""Section: the workload's state, as its `save_state` gave it."""
# 18 is reserved: working sets are learnt by restores, and stand beside the image (`working_set`).
LARGE_UNITS = 19
"""Section: one bit per 2 MiB unit of every region, the lowest of the first byte first; each region begins a byte."""

VERSION = 1

Kind = Literal["arena", "qemu", "process"]
Codec = Literal["none", "lz4", "zstd"]


class RegionInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A region of the workload that was saved."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    length: Annotated[int, Meta(gt=0, le=1 << 44, multiple_of=4096)]
    """Bytes."""
    page_size: Annotated[int, Meta(ge=4096, le=1 << 30)]


class Parent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The image that an incremental one builds on."""

    id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    """Checksum of its footer: another file of the same name is not taken for it."""
    path: Annotated[str, Meta(max_length=4096)]
    """Where it was when the image was written. Only its file name is used: it must be beside the image."""


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """What was saved, when, and how."""

    version: int = VERSION
    kind: Kind
    name: str
    details: dict[str, str | int | bool]
    regions: Annotated[list[RegionInfo], Meta(min_length=1, max_length=4096)]
    created: float
    """Seconds since 1970 of the instant whose memory it is."""
    codec: Codec
    restorable: bool = True
    """False for memory without a state: it can be looked at, not run."""
    parent: Parent | None = None


class ImageIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of an image: that of all copies of one file, and of no other image."""

    id: str
    """Random, 32 hexadecimal digits."""
    digest: str
    """Checksum of its footer, which covers its index and, by that, which image is its parent."""


def describe(
    workload: Identity,
    regions: Sequence[Extent],
    *,
    created: float,
    codec: Codec,
    restorable: bool,
    parent: Parent | None,
) -> Metadata:
    """What is to be said of an image of these regions of a workload."""
    return Metadata(
        kind=msgspec.convert(workload.kind, Kind),
        name=workload.name,
        details=workload.details,
        regions=[RegionInfo(name=one.name, length=one.length, page_size=one.page_size) for one in regions],
        created=created,
        codec=codec,
        restorable=restorable,
        parent=parent,
    )


def encode(metadata: Metadata) -> bytes:
    """The contents of the section."""
    return msgspec.msgpack.encode(metadata)


def decode(contents: bytes | None) -> Metadata:
    """From the contents of the section. Raises ImageError."""
    if contents is None:
        raise ImageError("the image has no metadata; use an image written by `pageferry checkpoint`")
    try:
        metadata = msgspec.msgpack.decode(contents, type=Metadata)
    except msgspec.MsgspecError as error:
        raise ImageError(f"the metadata of the image are invalid: {error}") from error
    if metadata.version != VERSION:
        raise ImageError(
            f"unsupported metadata version {metadata.version}: this pageferry supports {VERSION}; use the version "
            "that has written the image"
        )
    return metadata
