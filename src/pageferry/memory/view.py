"""A workload's memory as the engine sees it: a second mapping of every region, and where the workload maps it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

from pageferry._engine import Mapping, PageSet, ProcessRange, Space
from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE, Region

_SYS_MPROTECT = 10
_libc = ctypes.CDLL(None, use_errno=True)

EngineSegment = tuple[Space, int, int, int, int]
"""A `memory.regions.Segment` as the engine takes it: (address space, address, length, number of the region, first page
of the region)."""


class Extent(Protocol):
    """A piece of memory: a region of a workload, or a range of a process."""

    @property
    def name(self) -> str:
        """What it is called in an image."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def page_size(self) -> int:
        """Bytes."""


class Readable:
    """Memory that can be read, piece by piece: what a checkpoint needs to know about it."""

    regions: Sequence[Extent]
    mappings: Sequence[Mapping | ProcessRange]
    """Of every region, where it can be read."""

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.length for region in self.regions)

    def contents(self) -> list[tuple[Mapping | ProcessRange, int]]:
        """Of every region, where it can be read, and its page size."""
        return [(mapping, region.page_size) for mapping, region in zip(self.mappings, self.regions, strict=True)]

    def check_files(self) -> None:
        """Raises WorkloadError if a file of the memory is shorter than what is mapped: what was lost is not zeros."""

    def present(self) -> int:
        """Bytes that are in memory (or in the file's holes' neighbours: what SEEK_DATA calls data)."""
        return sum(end - start for mapping in self.mappings for start, end in mapping.data_ranges())


class HasRegions(Protocol):
    """A workload with its memory."""

    @property
    def name(self) -> str:
        """Name of the workload, for messages."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """Regions of its memory."""


class Memory(Readable):
    """The regions of a workload, mapped into our own address space, page sets and segments to go with them.

    Raises WorkloadDied when a process of the workload is gone, WorkloadError when its memory cannot be mapped.
    """

    def __init__(self, workload: HasRegions) -> None:
        self.regions: tuple[Region, ...] = workload.regions
        try:
            self.mappings: list[Mapping] = [
                Mapping(region.fd, region.length, region.file_offset) for region in self.regions
            ]
            self.segments = segments_of(self.regions)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{workload.name}: one of its processes has exited") from gone
        except OSError as error:
            raise WorkloadError(f"cannot map the memory of {workload.name}: {error}") from error
        self.name = workload.name
        self.check_files()

    def check_files(self) -> None:
        """As of `Readable`."""
        for region in self.regions:
            found, mapped = os.fstat(region.fd).st_size, region.file_offset + region.length
            if found < mapped:
                raise WorkloadError(
                    f"{self.name}: the file of its memory ({region.name}) was truncated to {found} bytes, of "
                    f"which {mapped} are mapped; restart the workload"
                )

    def large_units(self) -> list[list[bool]]:
        """Per region, which 2 MiB units stand on large pages. Regions on hugetlbfs: those that hold data."""
        return [
            _data_units(mapping) if region.page_size == LARGE_PAGE else mapping.large_units()
            for region, mapping in zip(self.regions, self.mappings, strict=True)
        ]

    def page_sets(self, *, full: bool = False) -> list[PageSet]:
        """One set per region, empty or full."""
        return [PageSet(region.length // SMALL_PAGE, full) for region in self.regions]

    def data_of(self, pages: list[PageSet]) -> list[PageSet]:
        """Of these pages, those that are in memory: all others are holes, which read as zeros."""
        found = []
        for mapping, wanted in zip(self.mappings, pages, strict=True):
            holes = PageSet(wanted.pages, True)
            for start, end in mapping.data_ranges():
                holes.remove(start // SMALL_PAGE, -(-end // SMALL_PAGE))
            data = wanted.copy()
            data.subtract(holes)
            found.append(data)
        return found

    def collapsible(self, units: list[list[bool]]) -> list[list[bool]]:
        """Of these units, those whose mapping can be split and made large again: hugetlbfs knows no other."""
        return [
            large if region.page_size == SMALL_PAGE else [] for region, large in zip(self.regions, units, strict=True)
        ]

    def restore_large_mappings(self, units: list[list[bool]]) -> None:
        """Map large pages as such again, after write traces have split their mappings. What fails stays small."""
        for space, address, length, region, first_page in self.segments:
            for start, end in _runs(units[region]):
                begin = max(start * LARGE_PAGE - first_page * SMALL_PAGE, 0)
                stop = min(end * LARGE_PAGE - first_page * SMALL_PAGE, length)
                if begin < stop and self.regions[region].page_size == SMALL_PAGE:
                    _collapse(space, address + begin, stop - begin)


def _collapse(space: Space, address: int, length: int) -> None:
    # Not aligned, or gone: then the next access maps it small.
    with contextlib.suppress(OSError):
        space.collapse(address, length)


def close_to_writes(space: Space, address: int, length: int) -> None:
    """Make a mapping read-only. Raises OSError where the process has ended or does not map it."""
    if space.pid != os.getpid():
        space.call(_SYS_MPROTECT, address, length, mmap.PROT_READ)
    elif _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), mmap.PROT_READ):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def segments_of(regions: Sequence[Region]) -> list[EngineSegment]:
    """Where the regions are mapped. Raises ProcessLookupError, OSError."""
    spaces = {pid: Space(pid) for pid in {segment.pid for region in regions for segment in region.segments}}
    return [
        (
            spaces[segment.pid],
            segment.address,
            segment.length,
            number,
            segment.offset // SMALL_PAGE,
        )
        for number, region in enumerate(regions)
        for segment in region.segments
    ]


def _data_units(mapping: Mapping) -> list[bool]:
    units = [False] * -(-mapping.length // LARGE_PAGE)
    for start, end in mapping.data_ranges():
        units[start // LARGE_PAGE : -(-end // LARGE_PAGE)] = [True] * (-(-end // LARGE_PAGE) - start // LARGE_PAGE)
    return units


def _runs(units: list[bool]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for number, unit in enumerate(units):
        if unit and runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        elif unit:
            runs.append((number, number + 1))
    return runs
