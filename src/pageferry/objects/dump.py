"""Writing of a Python object to an image (S4): its pickle and its buffers, with bounded memory.

The buffers are not copied as a whole. Pieces of the region pass through a sparse memory file, from which the engine
reads pages; each piece is freed before the next one is copied. The image has the form of the image of an arena.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args

from pageferry import values
from pageferry._engine import Mapping, PageSet, PageStore, WrittenImage
from pageferry.checkpoints.options import Options
from pageferry.checkpoints.save import writing
from pageferry.checkpoints.target import target as image_target
from pageferry.checkpoints.target import write_image
from pageferry.errors import PageferryError, UsageError
from pageferry.host.blocking import asynchronous
from pageferry.images import metadata
from pageferry.images.metadata import Codec
from pageferry.memory.regions import SMALL_PAGE
from pageferry.objects import layout
from pageferry.objects.pickling import Collected, ObjectPickler, names_of
from pageferry.stores.options import KeyArguments, KeyOptions
from pageferry.workloads.arena.arena import memory_file
from pageferry.workloads.arena.limits import MAX_ARENA

PIECE = 32 << 20
"""Maximum length of a piece, bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpResult:
    """Result of `pageferry.dump`."""

    buffers: int
    """Number of buffers that are loaded on demand."""
    buffer_bytes: int
    """Length of these buffers, bytes."""
    pickle_bytes: int
    """Length in bytes of the rest of the object, which `load` reads at once."""
    stored: int
    """Size of the image, bytes."""


def dump(obj: Any, target: str | Path, *, codec: Codec = "lz4", **options: Unpack[KeyArguments]) -> DumpResult:
    """Write a picklable object to an image, from which `load` creates it again. The image appears at `target` when it
    is complete and synced, and replaces an existing file. `target` can be the URL of an image in a store, which is
    encrypted with `key` or `key_command` (docs/stores.md).

    Buffers (pickle protocol 5) are stored uncopied on page boundaries, and are loaded on demand: arrays of numpy,
    columns of pandas, pyarrow and polars, sparse matrices of scipy, tensors of torch. Tensors that share a storage
    share it in the image. Everything else is in the pickle, and is loaded at once: Python strings in arrays and columns
    of objects, classes without support for protocol 5. Some classes copy buffers when they are loaded: trees of
    scikit-learn. `codec`: compression, `lz4`, `zstd` or `none`. The object must not change during the call. Additional
    memory: the pickle, copies of arrays that are not contiguous, and 32 MiB.

    Raises UsageError if the object cannot be pickled, CheckpointError if the image cannot be written, ImageError if the
    store has an image of this name, StoreError. An existing file is unchanged after an error.

    Examples:
        >>> import numpy, pageferry
        >>> result = pageferry.dump({"x": numpy.arange(1000), "unit": "mm"}, "data.img")
        >>> print(result.buffers, result.buffer_bytes)
        1 8000
        >>> data = pageferry.load("data.img")
        >>> print(data["x"][7], data["unit"])
        7 mm
    """
    place = image_target("target", target, values.options(KeyOptions, options))
    values.choice("codec", codec, get_args(Codec))
    place.check(Options(), None)
    stream, collected = _pickle(obj)
    infos, length = layout.place(stream.nbytes, collected.infos)
    directory = layout.Directory(pickle=stream.nbytes, buffers=infos)
    if length > MAX_ARENA:
        raise UsageError(f"cannot dump an object of {length} bytes: the limit is {MAX_ARENA} bytes")
    parts = [(0, stream), *((one.offset, view) for one, view in zip(infos, collected.views, strict=True))]
    with writing(place.place, "the object is unchanged"):
        written = write_image(place, lambda file: _write(file, parts, length, directory, codec))
    return DumpResult(
        buffers=len(infos),
        buffer_bytes=sum(one.length for one in infos),
        pickle_bytes=stream.nbytes,
        stored=written.length,
    )


dump_async = asynchronous(dump)


def _pickle(obj: object) -> tuple[memoryview, Collected]:
    """Return the pickle of an object, and its buffers. Raises UsageError."""
    stream, collected = io.BytesIO(), Collected()
    try:
        ObjectPickler(stream, collected, names_of(obj)).dump(obj)
    except PageferryError:
        raise
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"cannot dump an object of type {type(obj).__name__}: {error}; dump only picklable objects"
        ) from error
    return stream.getbuffer(), collected


def _write(
    file: int, parts: list[tuple[int, memoryview]], length: int, directory: layout.Directory, codec: Codec
) -> WrittenImage:
    """Write an image of a region of `length` bytes that contains `parts`, pairs of offset and contents in order."""
    staging, _ = memory_file(length, large_pages=False)
    try:
        store = PageStore(file, secrets.token_bytes(16), [length // SMALL_PAGE], codec=codec)
        memory, pages = Mapping(staging, length), PageSet(length // SMALL_PAGE)
        for start, end in _pieces(parts, memory):
            pages.insert(start // SMALL_PAGE, end // SMALL_PAGE)
            store.add(0, memory, pages)
            pages.remove(start // SMALL_PAGE, end // SMALL_PAGE)
            memory.discard(start, end - start)
        return store.finish(_sections(length, directory, codec))
    finally:
        os.close(staging)


def _pieces(parts: list[tuple[int, memoryview]], memory: Mapping) -> Iterator[tuple[int, int]]:
    """Copy the parts to the memory file, and yield each filled range of whole pages."""
    start = 0
    for offset, contents in parts:
        done = 0
        while done < contents.nbytes:
            position = offset + done
            if position - start >= PIECE:  # a page boundary, because gaps end there
                yield start, position
                start = position
            count = min(contents.nbytes - done, start + PIECE - position)
            memory.copy_in(position, contents[done : done + count])
            done += count
    end = -(-(parts[-1][0] + parts[-1][1].nbytes) // SMALL_PAGE) * SMALL_PAGE
    if end > start:
        yield start, end


def _sections(length: int, directory: layout.Directory, codec: Codec) -> list[tuple[int, bytes]]:
    described = metadata.Metadata(
        kind="arena",
        name="object",
        details={},
        regions=[metadata.RegionInfo(name="arena", length=length, page_size=SMALL_PAGE)],
        created=time.time(),
        codec=codec,
    )
    return [(metadata.METADATA, metadata.encode(described)), (metadata.STATE, layout.encode(directory))]
