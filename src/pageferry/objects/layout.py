"""Layout of an object in the image of an arena: its pickle and its buffers, and a directory of both.

The region of the image contains the pickle (protocol 5) at offset 0, followed by the buffers. A buffer of at least a
page starts on a page boundary; shorter buffers share pages. The directory is the state of the arena in the image, so a
later checkpoint of the arena contains the directory again. All fields are untrusted when an image is read: `decode`
checks every offset, length and shape before memory is allocated for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pageferry.errors import ImageError
from pageferry.memory.regions import SMALL_PAGE

VERSION = 1
ALIGNMENT = 64
"""Alignment of buffers that are shorter than a page, bytes."""
MAX_BUFFERS = 1 << 20
MAX_DIRECTORY = 256 << 20
"""Maximum length of the encoded directory, bytes."""

Length = Annotated[int, Meta(ge=0, le=1 << 46)]


class BufferInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Buffer of an object."""

    offset: Length
    """Offset in the region, bytes."""
    length: Length
    """Length, bytes."""
    name: Annotated[str, Meta(max_length=1024)]
    """Path of its owner in the containers of the object, such as `weights.0`; empty if unknown."""
    dtype: Annotated[str, Meta(min_length=1, max_length=65536)]
    """Type of the elements: a typestr of numpy such as `<f8`, or a list of fields in the form of `numpy.dtype.descr`;
    `|u1` if unknown."""
    shape: Annotated[list[Length], Meta(max_length=64)]
    order: Literal["C", "F"] = "C"
    readonly: bool = False
    """Whether the buffer was read-only when the object was saved, as all data of pyarrow is."""


class Directory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Directory of an object."""

    format: Literal["pageferry-object"] = "pageferry-object"
    version: int = VERSION
    pickle: Annotated[int, Meta(ge=1, le=1 << 46)]
    """Length of the pickle, bytes."""
    buffers: Annotated[list[BufferInfo], Meta(max_length=MAX_BUFFERS)]


def place(pickle: int, buffers: Sequence[BufferInfo]) -> tuple[list[BufferInfo], int]:
    """Assign offsets to buffers that follow a pickle of `pickle` bytes. Return the buffers and the length of the
    region, bytes."""
    end, placed = pickle, []
    for one in buffers:
        start = _aligned(end, SMALL_PAGE if one.length >= SMALL_PAGE else ALIGNMENT)
        placed.append(msgspec.structs.replace(one, offset=start))
        end = start + one.length
    return placed, _aligned(end, SMALL_PAGE)


def encode(directory: Directory) -> bytes:
    """Return the directory as the state of an arena."""
    return msgspec.msgpack.encode(directory)


def decode(state: bytes, length: int, source: object) -> Directory:
    """Parse and check the directory of an object in a region of `length` bytes. `source`: image, for error messages.

    Raises ImageError if the state is not a directory, or if the directory is damaged.
    """
    if len(state) > MAX_DIRECTORY:
        raise ImageError(
            f"cannot read {source}: its directory has {len(state)} bytes, the limit is {MAX_DIRECTORY}; dump the "
            "object again"
        )
    try:
        found = msgspec.msgpack.decode(state, type=Directory)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ImageError(
            f"cannot read {source} as an object: it has no directory of buffers ({error}); use an image written by "
            "`pageferry.dump`, or `pageferry.restore` for the image of an arena"
        ) from error
    if found.version != VERSION:
        raise ImageError(
            f"cannot read {source}: unsupported version {found.version} of the directory, this pageferry supports "
            f"{VERSION}; use the version that wrote the image"
        )
    _check(found, length, source)
    return found


def _check(directory: Directory, length: int, source: object) -> None:
    """Raise ImageError unless the pickle and all buffers lie in the region, in order and without overlap."""
    end = directory.pickle
    for number, one in enumerate(directory.buffers):
        if one.offset < end or one.offset % (SMALL_PAGE if one.length >= SMALL_PAGE else ALIGNMENT):
            raise _damaged(source, f"buffer {number} starts at {one.offset}")
        if one.length % math.prod(one.shape) if math.prod(one.shape) else one.length:
            raise _damaged(source, f"buffer {number} has {one.length} bytes and the shape {one.shape}")
        end = one.offset + one.length
    if end > length:
        raise _damaged(source, f"its contents end at {end}, and its region has {length} bytes")


def _damaged(source: object, cause: str) -> ImageError:
    return ImageError(f"{source} is damaged: {cause}; dump the object again")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
