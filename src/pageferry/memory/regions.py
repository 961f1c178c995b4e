"""Regions of a workload's memory, where its processes map them, and the identity of the workload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pageferry import _engine

SMALL_PAGE = _engine.SMALL_PAGE
LARGE_PAGE = _engine.LARGE_PAGE


@dataclass(frozen=True, slots=True)
class Segment:
    """Mapping of a part of a region in the address space of a process that runs the workload.

    Several processes may map a region, and one process may map it in several parts.
    """

    pid: int
    address: int
    """Address of the mapping in the process."""
    length: int
    """Length, bytes."""
    offset: int
    """Start of the mapping within the region, bytes."""

    def within(self, parts: Iterable[tuple[int, int]]) -> Iterator[Segment]:
        """Yield the parts of this mapping that map the given parts of the region, each as (first byte, length)."""
        for start, length in parts:
            first = max(start, self.offset)
            end = min(start + length, self.offset + self.length)
            if first < end:
                yield Segment(self.pid, self.address + first - self.offset, end - first, first)


@dataclass(frozen=True, slots=True)
class Region:
    """Contiguous part of a workload's memory that is backed by one shared file."""

    name: str
    """Name, the same on all hosts: QEMU's ramblock id, `arena`, or the name of the mapped file for any other
    process."""
    length: int
    """Length, bytes."""
    fd: int
    """File descriptor of the backing file, open for reading and writing; owned by the workload object."""
    file_offset: int
    """Start of the region within the file, bytes."""
    page_size: int
    """Page size in bytes: 4096, or 2 MiB if the file is on hugetlbfs."""
    segments: tuple[Segment, ...]
    """Mappings of the region in the workload's processes."""


class PlacedSegment(Protocol):
    """Mapping of a part of a region: a `Segment`, or the record of one."""

    @property
    def pid(self) -> int:
        """Process that maps the part."""

    @property
    def address(self) -> int:
        """Address of the mapping."""

    @property
    def length(self) -> int:
        """Length, bytes."""

    @property
    def offset(self) -> int:
        """Start of the mapping within the region, bytes."""


class Placed(Protocol):
    """Region that is mapped: a `Region`, or the record of one."""

    @property
    def length(self) -> int:
        """Length, bytes."""

    @property
    def segments(self) -> Sequence[PlacedSegment]:
        """Mappings of the region."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Kind, name and details of a workload. A destination checks them before other data is sent."""

    kind: str
    """Kind of the workload: `arena`, `qemu` or `process`."""
    name: str
    details: dict[str, Any] = field(default_factory=dict)
    """Details that depend on the kind, for checks and error messages (QEMU version, machine type...)."""
