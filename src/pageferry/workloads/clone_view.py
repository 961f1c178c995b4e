"""Memory of a clone as seen from outside: private pages of its process, and, for all other pages, the base or its
image.

PAGEMAP_SCAN finds the private pages, without a write trace: they are the pages of the mapping that are not pages of the
base. A private page never becomes a page of the base again, because the pages of a clone are locked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pageferry._engine import MappedSegment, ProcessRange, Space
from pageferry.errors import ImageError, UnsupportedError, UsageError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.registry import Registry
from pageferry.images.image import ImageFile
from pageferry.images.targets import large_units
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Readable, mapped, numbered
from pageferry.pager import base_records
from pageferry.pager.base_records import CloneRecord
from pageferry.pager.clone_memory import base_offsets
from pageferry.pager.records import RegionRecord
from pageferry.stores.lazy_image import open_image_file

MOVE_BACK = "move it back"
"""Advice for a command that cannot be given another path of the image."""


def open_image(
    name: str,
    record: CloneRecord,
    path: Path | None = None,
    *,
    moved: str = "name it with `parent`",
) -> ImageFile:
    """Open the image whose memory the clone `name` shares. `path`: path of the image; None for its path when the clone
    was started. `moved`: advice if the image is no longer at its path.

    Raises UsageError if another image is at `path`, ImageError if the image cannot be opened or has been replaced.
    """
    if path is not None:
        image = open_image_file(path)
        if image.identity != record.identity:
            raise UsageError(
                f"cannot use {path} as the parent: {name} shares the memory of {record.image}, which is the parent of "
                "its checkpoints; omit `parent`, or name that image or a copy of it"
            )
        return image
    try:
        image = open_image_file(record.image)
    except ImageError as error:
        raise ImageError(
            f"cannot read the image whose memory {name} shares: {error}; if it was moved, {moved}"
        ) from error
    if image.identity == record.identity:
        return image
    raise ImageError(
        f"cannot use {record.image}: it has been replaced since {name} was started from it; restore the original image"
    )


class PrivateMemory(Readable):
    """Private pages of a clone. The constructor raises WorkloadDied, WorkloadError if the memory cannot be read,
    UnsupportedError."""

    def __init__(self, name: str, record: CloneRecord, image: ImageFile | None = None) -> None:
        self.name = name
        self.record = record
        self.regions: list[RegionRecord] = record.regions
        self._image = image
        try:
            self.space = Space(record.pid)
            self._check_mapped()
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{name} (process {record.pid}) has exited") from gone
        except PermissionError as denied:
            raise WorkloadError(
                f"cannot read the memory of {name}: permission denied; run as the user of its QEMU, or as root"
            ) from denied
        self.mappings = self._ranges = [
            ProcessRange(self.space, _address(name, region), region.length, private=True) for region in self.regions
        ]

    def check_files(self) -> None:
        """Raise WorkloadError if a part of the memory is no longer mapped: its pages must not be taken from the base.
        Raises WorkloadDied."""
        self._check_mapped()

    def _check_mapped(self) -> None:
        """Raise WorkloadError if a part of the memory is no longer a private mapping of the base."""
        base = (self.record.device, self.record.inode)
        found = [one for one in proc.file_mappings(self.record.pid) if one.identity == base and not one.shared]
        for region in self.regions:
            for segment in region.segments:
                at, end = segment.address, segment.address + segment.length
                for mapping in found:
                    if mapping.address <= at < mapping.end:
                        at = mapping.end
                if at < end:
                    raise WorkloadError(
                        f"cannot read the memory of {self.name}: QEMU no longer maps {region.name} from the base"
                    )

    @property
    def segments(self) -> list[MappedSegment]:
        """Mappings in which writes can be traced."""
        return mapped({self.space.pid: self.space}, numbered(self.regions))

    def large_units(self) -> list[list[bool]]:
        """Return, per region, whether each 2 MiB unit will be backed by a huge page after a restore: as in the parent
        image if there is one, otherwise as `Readable.large_units` returns."""
        return super().large_units() if self._image is None else large_units(self._image)

    @contextlib.contextmanager
    def traceable(self, purpose: str) -> Iterator[dict[int, int]]:
        """Exclude other traces of the private pages during the block. Yield a descriptor of the userfaultfd that QEMU
        keeps, by process id.

        A trace uses this userfaultfd, because memory can be registered with one only, so the kernel does not refuse a
        second trace. Of two traces, only one would report a written page. Raises WorkloadError, naming `purpose`, if
        another operation traces the clone, OSError.
        """
        with Registry().folder(self.name).exclusively(purpose, lock="traced"):
            userfault = self.space.descriptor(self.record.userfault)
            try:
                yield {self.record.pid: userfault}
            finally:
                os.close(userfault)

    def over_base(self) -> list[ProcessRange]:
        """Return the regions as private pages over the pages that the base contains, to be sent. Raises WorkloadDied,
        WorkloadError."""
        base = self._open_base()
        if base is None:
            raise WorkloadError(f"cannot read the base of {self.name}: QEMU no longer has its descriptor; retry")
        try:
            starts = zip(self.regions, base_offsets(self.regions), strict=True)
            return [
                ProcessRange(self.space, _address(self.name, region), region.length, private=True, base=(base, start))
                for region, start in starts
            ]
        finally:
            os.close(base)

    def read(self, number: int, first: int, count: int) -> bytes:
        """Return `count` pages of a region from page `first` on. Pages that a running guest writes may be torn.

        Raises ImageError if pages are neither private nor loaded, and the image cannot be read. Raises
        WorkloadDied if the clone has exited.
        """
        shared = self._read_base(number, first, count)
        try:
            return self._ranges[number].overlay(first * SMALL_PAGE, shared)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{self.name} (process {self.record.pid}) has exited") from gone

    def _read_base(self, number: int, first: int, count: int) -> bytes:
        """Return pages of the base. Pages that the base lacks are read from the image."""
        start, length = base_offsets(self.regions)[number] + first * SMALL_PAGE, count * SMALL_PAGE
        base = self._open_base()
        try:
            if base is not None and _is_data(base, start, start + length):
                return os.pread(base, length, start)
        finally:
            if base is not None:
                os.close(base)
        image = self._image or open_image(self.name, self.record, moved=MOVE_BACK)
        before = sum(region.length for region in self.regions[:number]) // SMALL_PAGE
        return image.read(before + first, count)

    def _open_base(self) -> int | None:
        """Open the base for reading; return None if the descriptor of QEMU refers to another file. Raises
        WorkloadDied."""
        of = self.record
        try:
            return base_records.reopen(of.pid, of.descriptor, of.device, of.inode)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{self.name} (process {of.pid}) has exited") from gone
        except FileNotFoundError:
            return None


def _address(name: str, region: RegionRecord) -> int:
    """Return the address of a region. Raises UnsupportedError if its parts are not mapped one after another."""
    parts = sorted(region.segments, key=lambda segment: segment.offset)
    start, at = parts[0].address, 0
    for part in parts:
        if (part.offset, part.address) != (at, start + at):
            raise UnsupportedError(f"cannot read the memory of {name}: QEMU maps {region.name} in separate parts")
        at += part.length
    if at != region.length:
        raise UnsupportedError(f"cannot read the memory of {name}: QEMU maps only a part of {region.name}")
    return start


def _is_data(descriptor: int, start: int, end: int) -> bool:
    """Return whether a file has no hole between two offsets. A hole is memory that the pager has not loaded."""
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA) == start and os.lseek(descriptor, start, os.SEEK_HOLE) >= end
    except OSError:  # no data up to the end of the file
        return False
