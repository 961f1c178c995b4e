"""Metadata of an image: the sections that the engine stores without interpreting them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from pageferry.errors import ImageError
from pageferry.memory.regions import Identity
from pageferry.memory.view import Extent

METADATA = 16
"""Section: `Metadata`, as MessagePack."""
STATE = 17
"""Section: state of the workload, as returned by its `save_state`."""
# Section 18 is reserved. Restores record working sets in a file beside the image (`working_set`).
LARGE_UNITS = 19
"""Section: bitmap of the 2 MiB units that were backed by huge pages, least significant bit of the first byte first.
Each region starts a new byte."""

VERSION = 1

FIRECRACKER: Final = "firecracker"
"""Kind of an image of a snapshot of Firecracker. It has one region, with the layout of the memory file."""

CLOUD_HYPERVISOR: Final = "cloud-hypervisor"
"""Kind of an image of a VM of Cloud Hypervisor. It has one region per memory slot."""

Kind = Literal["arena", "qemu", "process", "firecracker", "cloud-hypervisor"]
Codec = Literal["none", "lz4", "zstd"]


class RegionInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Region of the workload that was saved."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    length: Annotated[int, Meta(gt=0, le=1 << 44, multiple_of=4096)]
    """Length, bytes."""
    page_size: Annotated[int, Meta(ge=4096, le=1 << 30)]


class Parent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Reference of an incremental image to its parent."""

    id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    """Checksum of the parent's footer, which distinguishes it from other files of the same name."""
    path: Annotated[str, Meta(max_length=4096)]
    """Path of the parent when the image was written. Only the file name is used: the parent must be in the directory of
    the image."""

    @property
    def identity(self) -> ImageIdentity:
        """Identity of the parent."""
        return ImageIdentity(id=self.id, digest=self.digest)


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """Description of an image: its workload, regions, time and codec."""

    version: int = VERSION
    kind: Kind
    name: str
    details: dict[str, str | int | bool]
    regions: Annotated[list[RegionInfo], Meta(min_length=1, max_length=4096)]
    created: float
    """Time of the snapshot point, seconds since 1970."""
    codec: Codec
    restorable: bool = True
    """Whether a workload can be restored from the image. False for memory without a state, which can only be
    inspected."""
    parent: Parent | None = None


class ImageIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Identity of an image, shared by all copies of one file and by no other image."""

    id: str
    """Random identifier, 32 hexadecimal digits."""
    digest: str
    """Checksum of the footer, which covers the index and thereby the reference to the parent."""


def describe(
    workload: Identity,
    regions: Sequence[Extent],
    *,
    created: float,
    codec: Codec,
    restorable: bool,
    parent: Parent | None,
) -> Metadata:
    """Return the metadata for an image of these regions of a workload."""
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
    """Return the contents of the section `METADATA`."""
    return msgspec.msgpack.encode(metadata)


def decode(contents: bytes | None) -> Metadata:
    """Parse the contents of the section `METADATA`. Raises ImageError."""
    if contents is None:
        raise ImageError("cannot read the image: it has no metadata; use an image written by `pageferry checkpoint`")
    try:
        metadata = msgspec.msgpack.decode(contents, type=Metadata)
    except msgspec.MsgspecError as error:
        raise ImageError(
            f"cannot read the image: its metadata is invalid ({error}); take another checkpoint"
        ) from error
    if metadata.version != VERSION:
        raise ImageError(
            f"cannot read the image: unsupported metadata version {metadata.version}, this pageferry supports "
            f"{VERSION}; use the version that wrote the image"
        )
    return metadata
