"""View of a workload's memory for the engine: a mapping of every region, and the addresses of the region in the
processes of the workload."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from pageferry._engine import MappedSegment, Mapping, PageSet, ProcessRange, Space
from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.memory import bitmaps
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE, Placed, PlacedSegment, Region


class Extent(Protocol):
    """Range of memory: a region of a workload, or a range of a process."""

    @property
    def name(self) -> str:
        """Name of the region in an image."""

    @property
    def length(self) -> int:
        """Length, bytes."""

    @property
    def page_size(self) -> int:
        """Page size, bytes."""


class Readable:
    """Memory that a checkpoint can read."""

    regions: Sequence[Extent]
    mappings: Sequence[Mapping | ProcessRange]
    """Sources from which the regions are read, in the order of the regions."""

    @property
    def size(self) -> int:
        """Size of all regions, bytes."""
        return sum(region.length for region in self.regions)

    def contents(self) -> list[tuple[Mapping | ProcessRange, int]]:
        """Return the source and the page size of each region."""
        return [(mapping, region.page_size) for mapping, region in zip(self.mappings, self.regions, strict=True)]

    def check_files(self) -> None:
        """Raise WorkloadError if a file of the memory has been truncated: the lost contents must not be read as
        zeros."""

    @property
    def segments(self) -> list[MappedSegment]:
        """Mappings in which writes can be traced; empty for memory that can be saved only while its process is
        stopped."""
        return []

    def large_units(self) -> list[list[bool]]:
        """Return, per region, the 2 MiB units to be backed by huge pages after a restore."""
        return [[] for _ in self.regions]

    def restore_large_mappings(self, units: list[list[bool]]) -> None:
        """Restore the PMD mappings of huge pages that write traces have split."""

    def page_sets(self, *, full: bool = False) -> list[PageSet]:
        """Return one page set per region, empty or full."""
        made = PageSet.full if full else PageSet
        return [made(region.length // SMALL_PAGE) for region in self.regions]

    def present(self) -> int:
        """Return the number of bytes in data extents (SEEK_DATA)."""
        return sum(end - start for mapping in self.mappings for start, end in mapping.data_ranges())


class HasRegions(Protocol):
    """Workload with regions of memory."""

    @property
    def name(self) -> str:
        """Name of the workload, for error messages."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """Regions of the workload's memory."""


class Memory(Readable):
    """Regions of a workload, mapped into this process, with page sets and segments for them.

    The constructor raises WorkloadDied if a process of the workload has exited, WorkloadError if its memory cannot be
    mapped.
    """

    def __init__(self, workload: HasRegions) -> None:
        self.regions: tuple[Region, ...] = workload.regions
        try:
            self.mappings: list[Mapping] = [
                Mapping(region.fd, region.length, region.file_offset) for region in self.regions
            ]
            self._segments = segments_of(self.regions)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"cannot map the memory of {workload.name}: one of its processes has exited") from gone
        except OSError as error:
            raise WorkloadError(f"cannot map the memory of {workload.name}: {error}") from error
        self.name = workload.name
        self.check_files()

    @property
    def segments(self) -> list[MappedSegment]:
        """Mappings of the regions in the workload's processes."""
        return self._segments

    def close(self) -> None:
        """Unmap the regions now, and close the segments: an exception may keep a reference to this object."""
        self.mappings.clear()
        self._segments.clear()

    def check_files(self) -> None:
        """See `Readable`."""
        for region in self.regions:
            found, mapped = os.fstat(region.fd).st_size, region.file_offset + region.length
            if found < mapped:
                raise WorkloadError(
                    f"cannot use the memory of {self.name}: the file of {region.name} was truncated to {found} bytes, "
                    f"and {mapped} bytes of it are mapped; restart the workload"
                )

    def large_units(self) -> list[list[bool]]:
        """Return, per region, the 2 MiB units that are backed by huge pages; on hugetlbfs, those that contain data."""
        return [
            _data_units(mapping) if region.page_size == LARGE_PAGE else mapping.large_units()
            for region, mapping in zip(self.regions, self.mappings, strict=True)
        ]

    def data_of(self, pages: list[PageSet]) -> list[PageSet]:
        """Return those of the given pages that are in data extents. The others are in holes, which read as zeros."""
        found = []
        for mapping, wanted in zip(self.mappings, pages, strict=True):
            holes = PageSet.full(wanted.pages)
            for start, end in mapping.data_ranges():
                holes.remove(start // SMALL_PAGE, -(-end // SMALL_PAGE))
            data = wanted.copy()
            data.subtract(holes)
            found.append(data)
        return found

    def collapsible(self, units: list[list[bool]]) -> list[list[bool]]:
        """Return the given units whose PMD mapping can be split and restored; on hugetlbfs there are none."""
        return [
            large if region.page_size == SMALL_PAGE else [] for region, large in zip(self.regions, units, strict=True)
        ]

    def restore_large_mappings(self, units: list[list[bool]]) -> None:
        """Restore the PMD mappings of huge pages that write traces have split. After a failure, PTE mappings remain."""
        for one in self.segments:
            for start, end in bitmaps.runs(units[one.region]):
                begin = max(start * LARGE_PAGE - one.first_page * SMALL_PAGE, 0)
                stop = min(end * LARGE_PAGE - one.first_page * SMALL_PAGE, one.length)
                if begin < stop and self.regions[one.region].page_size == SMALL_PAGE:
                    _collapse(one.space, one.address + begin, stop - begin)


def _collapse(space: Space, address: int, length: int) -> None:
    # If the range is not aligned or no longer huge, the next access maps base pages.
    with contextlib.suppress(OSError):
        space.collapse(address, length)


def segments_of(regions: Sequence[Region]) -> list[MappedSegment]:
    """Return the segments of the regions. Raises ProcessLookupError if a process has exited, OSError if one cannot be
    traced."""
    spaces = {pid: Space(pid) for pid in {segment.pid for region in regions for segment in region.segments}}
    return mapped(spaces, numbered(regions))


def numbered(regions: Sequence[Placed]) -> Iterator[tuple[int, PlacedSegment]]:
    """Yield all segments of the regions, each with the index of its region."""
    for number, region in enumerate(regions):
        yield from ((number, segment) for segment in region.segments)


def mapped(spaces: dict[int, Space], segments: Iterable[tuple[int, PlacedSegment]]) -> list[MappedSegment]:
    """Return segments in the form that the engine takes. `spaces`: address spaces of their processes, by pid;
    `segments`: each with the index of its region."""
    return [
        MappedSegment(spaces[segment.pid], segment.address, segment.length, number, segment.offset // SMALL_PAGE)
        for number, segment in segments
    ]


def _data_units(mapping: Mapping) -> list[bool]:
    units = [False] * -(-mapping.length // LARGE_PAGE)
    for start, end in mapping.data_ranges():
        units[start // LARGE_PAGE : -(-end // LARGE_PAGE)] = [True] * (-(-end // LARGE_PAGE) - start // LARGE_PAGE)
    return units
