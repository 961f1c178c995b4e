"""Snapshot files of Firecracker as images: the memory file and the state file (vmstate), in both directions.

The memory file contains the memory of all regions of the microVM one after the other, without the gap for devices below
4 GiB. The image has one region with this layout, so that offsets in the file, in the image and in Firecracker's
userfaultfd handshake are the same. The state file is opaque, and is stored as the state of the image.

A diff snapshot is a sparse file: its holes are pages that have not changed since the snapshot it is based on. It
becomes an image whose parent is the image of that snapshot. Pieces of the file pass through a sparse memory file, from
which the engine reads pages, as in `pageferry.objects.dump`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pageferry._engine import Mapping, PageSet, PageStore, WrittenImage
from pageferry.checkpoints.save import writing
from pageferry.errors import CheckpointError, ImageError, UsageError
from pageferry.host import files
from pageferry.images import metadata, targets
from pageferry.images.image import SLICE, ImageFile, beside, new_file
from pageferry.images.metadata import Codec
from pageferry.memory.regions import SMALL_PAGE
from pageferry.workloads.arena.arena import memory_file

REGION = "memory"
"""Name of the region of the image."""
NAME = "microvm"
"""Name of the workload of the image. The snapshot has none."""
MAX_STATE = 256 << 20
"""Maximum size of the state file, bytes."""
MAX_MEMORY = 1 << 44
"""Maximum size of the memory file, bytes: that of a region of an image."""
PIECE = SLICE * SMALL_PAGE
"""Maximum length of a piece, bytes."""
_ZEROS = bytes(SMALL_PAGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFiles:
    """Memory file and state file of a snapshot."""

    memory: Path
    state: Path


# -- import


def import_snapshot(
    source: SnapshotFiles, target: Path, *, parent: ImageFile | None, full: bool, codec: Codec
) -> WrittenImage:
    """Write the image of a snapshot, which appears at `target` when it is complete and synced.

    With a parent, the image contains the pages that differ from it. Holes of the memory file are then pages of the
    parent, unless `full` is true; without a parent, and in a full snapshot, they are zeros.

    Raises UsageError if a file cannot be used, CheckpointError if a file cannot be read or the image not be written,
    ImageError if the parent is damaged. An existing file at `target` is unchanged after an error.
    """
    target = target.absolute()
    with _opened(source.memory) as file:
        length = _memory_length(source.memory, file)
        _check_target(source, target, file)
        if parent is not None:
            _check_parent(parent, target, length)
            if not full:
                _check_holes(source.memory, file)
        state = _read_state(source.state)
        with writing(target, "the snapshot files are unchanged"), new_file(target) as image:
            reader = _MemoryReader(source.memory, file, length, whole=full and parent is not None)
            return _write(image, reader, parent, _sections(source, length, codec, parent, state), codec)


def _check_holes(path: Path, file: int) -> None:
    """Raise UsageError if pages that were not written may be data in a sparse file: they would replace those of the
    parent by zeros."""
    if (block := os.fstat(file).st_blksize) > SMALL_PAGE:
        raise UsageError(
            f"cannot import {path} as a diff snapshot: its file system allocates {block} bytes at a time, so its holes "
            "do not show which pages are unchanged; use a file system with blocks of 4 KiB, or import "
            "a full snapshot with --full (in Python full=True)"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = files.open_regular(path)
    except OSError as error:
        raise UsageError(f"cannot open {path}: {error.strerror or error}; give a file of the snapshot") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _memory_length(path: Path, file: int) -> int:
    length = os.fstat(file).st_size
    if not length or length % SMALL_PAGE or length > MAX_MEMORY:
        raise UsageError(
            f"cannot import {path}: it has {length} bytes, expected a multiple of {SMALL_PAGE}, up to "
            f"{MAX_MEMORY >> 40} TiB; give the memory file (`mem_file_path`) of a snapshot that is complete"
        )
    return length


def _read_state(path: Path) -> bytes:
    try:
        state = files.read_regular(path, MAX_STATE)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}; give a file of the snapshot") from error
    if not state:
        raise UsageError(f"cannot import {path}: it is empty; give the state file (`snapshot_path`) of the snapshot")
    return state


def _check_target(source: SnapshotFiles, target: Path, memory: int) -> None:
    if target.is_dir():
        raise UsageError(f"cannot write {target}: it is a directory; give the name of a file")
    with contextlib.suppress(OSError):  # there is no file, or opening it fails with this error
        found = os.stat(target)
        if os.path.samestat(found, os.fstat(memory)) or os.path.samestat(found, os.stat(source.state)):
            raise UsageError(f"cannot write {target}: it is a file of the snapshot; use another name")


def _check_parent(parent: ImageFile, target: Path, length: int) -> None:
    """Raise UsageError unless the parent is an image of a snapshot with this much memory, in the directory of the new
    image."""
    targets.check_firecracker(parent)
    older = parent.metadata.regions[0].length
    if older != length:
        raise UsageError(
            f"cannot use {parent.path} as the parent: its memory has {older} bytes, the snapshot {length}; use an "
            "image of the same microVM, or none"
        )
    needed = beside(target, parent.path)
    if not (needed.exists() and needed.samefile(parent.path)):
        raise UsageError(
            f"cannot write {target}: its parent {parent.path} must be in the same directory; write to "
            f"{parent.path.parent}, or put a symbolic link to the parent into {target.parent}"
        )
    parent.check_target(target)


def _sections(
    source: SnapshotFiles, length: int, codec: Codec, parent: ImageFile | None, state: bytes
) -> list[tuple[int, bytes]]:
    described = metadata.Metadata(
        kind=metadata.FIRECRACKER,
        name=NAME,
        details={},
        regions=[metadata.RegionInfo(name=REGION, length=length, page_size=SMALL_PAGE)],
        created=os.stat(source.state).st_mtime,
        codec=codec,
        parent=parent.as_parent() if parent is not None else None,
    )
    return [(metadata.METADATA, metadata.encode(described)), (metadata.STATE, state)]


class _MemoryReader:
    """Reader of the memory file, in pieces. `whole`: whether holes are read as zeros instead of being skipped."""

    def __init__(self, path: Path, file: int, length: int, *, whole: bool) -> None:
        self.length = length
        self._path = path
        self._file = file
        self._whole = whole
        self._begin = os.fstat(file)

    def pieces(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the ranges (start, end) of the file to read, in bytes, grouped into pieces that end at multiples of
        PIECE. Raises CheckpointError."""
        piece: list[tuple[int, int]] = []
        for start, end in [(0, self.length)] if self._whole else self._data():
            at = start
            while at < end:
                if piece and piece[0][0] // PIECE != at // PIECE:
                    yield piece
                    piece = []
                stop = min(end, (at // PIECE + 1) * PIECE)
                piece.append((at, stop))
                at = stop
        if piece:
            yield piece

    def _data(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the file that are not holes, extended to whole pages."""
        at = 0
        while at < self.length:
            try:
                first = os.lseek(self._file, at, os.SEEK_DATA)
                last = os.lseek(self._file, first, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    return
                raise CheckpointError(f"cannot read {self._path}: {error.strerror or error}") from error
            end = min(-(-last // SMALL_PAGE) * SMALL_PAGE, self.length)
            yield max(first // SMALL_PAGE * SMALL_PAGE, at), end
            at = end

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes of a range. Raises CheckpointError."""
        parts, at = [], start
        while at < end:
            try:
                part = os.pread(self._file, end - at, at)
            except OSError as error:
                raise CheckpointError(f"cannot read {self._path}: {error.strerror or error}") from error
            if not part:
                raise self._changed()
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file has been written to since it was opened."""
        now = os.fstat(self._file)
        if (now.st_size, now.st_mtime_ns) != (self._begin.st_size, self._begin.st_mtime_ns):
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"cannot import {self._path}: it was changed during the import; wait until Firecracker has replied to "
            "`PUT /snapshot/create`"
        )


def _write(
    image: int, reader: _MemoryReader, parent: ImageFile | None, sections: list[tuple[int, bytes]], codec: Codec
) -> WrittenImage:
    staging, _ = memory_file(reader.length, large_pages=False)
    try:
        store = PageStore(image, os.urandom(16), [reader.length // SMALL_PAGE], codec=codec)
        mapping, pages = Mapping(staging, reader.length), PageSet(reader.length // SMALL_PAGE)
        with mmap.mmap(staging, reader.length) as memory:
            for piece in reader.pieces():
                first, end = piece[0][0], piece[-1][1]
                older = None
                if parent is not None:
                    older = parent.read(first // SMALL_PAGE, (end - first) // SMALL_PAGE)
                for start, stop in piece:
                    contents = reader.read(start, stop)
                    memory[start:stop] = contents
                    pages.insert(start // SMALL_PAGE, stop // SMALL_PAGE)
                    if older is not None:
                        _leave_out(pages, contents, start, older[start - first : stop - first])
                store.add(0, mapping, pages)
                pages.clear()
                memory.madvise(mmap.MADV_REMOVE, first, end - first)
        reader.check_unchanged()
        return store.finish(sections, parent=parent.chain if parent is not None else None)
    finally:
        os.close(staging)


def _leave_out(pages: PageSet, contents: bytes, start: int, older: bytes) -> None:
    """Remove the pages whose contents, from byte `start` of the memory on, are those of the parent."""
    for at in range(0, len(contents), SMALL_PAGE):
        if contents[at : at + SMALL_PAGE] == older[at : at + SMALL_PAGE]:
            page = (start + at) // SMALL_PAGE
            pages.remove(page, page + 1)


# -- export


def export_snapshot(image: ImageFile, target: SnapshotFiles) -> None:
    """Write the memory file and the state file of a snapshot, with the bytes that were imported. Pages of zeros are
    holes of the memory file. Each file appears when it is complete and synced; existing files are replaced.

    Raises UsageError if the image is not that of a snapshot or if a file is in its chain, ImageError if the image is
    damaged or a file cannot be written.
    """
    targets.check_firecracker(image)
    for path in (target.memory, target.state):
        image.check_target(path)
    if target.memory.resolve() == target.state.resolve():
        raise UsageError(f"cannot write the memory file and the state file to the same path {target.memory}; use two")
    state = image.state()
    with _writing(target.memory), new_file(target.memory.absolute()) as file:
        _write_memory(image, file)
    with _writing(target.state):
        files.replace_file(target.state.absolute(), state, synced=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ImageError(f"cannot write {path}: {error.strerror or error}") from error


def _write_memory(image: ImageFile, file: int) -> None:
    os.ftruncate(file, image.pages * SMALL_PAGE)
    for first in range(0, image.pages, SLICE):
        contents = image.read(first, min(SLICE, image.pages - first))
        for start, end in _data_runs(contents):
            files.write_at(file, contents[start:end], first * SMALL_PAGE + start)


def _data_runs(contents: bytes) -> Iterator[tuple[int, int]]:
    """Yield the runs (start, end) of pages that are not zeros, in bytes."""
    start = None
    for at in range(0, len(contents), SMALL_PAGE):
        if contents[at : at + SMALL_PAGE] == _ZEROS:
            if start is not None:
                yield start, at
            start = None
        elif start is None:
            start = at
    if start is not None:
        yield start, len(contents)
