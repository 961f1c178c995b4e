"""Regions of a workload's memory, where its processes map them, and the identity of the workload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pageferry import _engine

SMALL_PAGE = _engine.SMALL_PAGE
LARGE_PAGE = _engine.LARGE_PAGE


@dataclass(frozen=True, slots=True)
class Segment:
    """One mapping of a part of a region in the address space of a process that runs the workload.

    A region may be mapped by several processes, and one process may map it in several pieces.
    """

    pid: int
    address: int
    """Start of the mapping in the process, bytes."""
    length: int
    """Bytes."""
    offset: int
    """Where in the region the mapping starts, bytes."""

    def within(self, parts: Iterable[tuple[int, int]]) -> Iterator[Segment]:
        """Yield the parts of the mapping that show these parts of its region, given as (first byte, length)."""
        for start, length in parts:
            first = max(start, self.offset)
            end = min(start + length, self.offset + self.length)
            if first < end:
                yield Segment(self.pid, self.address + first - self.offset, end - first, first)


@dataclass(frozen=True, slots=True)
class Region:
    """A contiguous piece of a workload's memory that is backed by one shared file."""

    name: str
    """Stable across hosts: QEMU's ramblock id, or `arena`; of any other process, the file that it maps."""
    length: int
    """Bytes."""
    fd: int
    """File descriptor of the backing file, open for reading and writing; owned by the workload object."""
    file_offset: int
    """Where in the file the region starts, bytes."""
    page_size: int
    """4096, or 2 MiB where the file is on hugetlbfs."""
    segments: tuple[Segment, ...]
    """Where the workload's processes map it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Kind, name and details of a workload. A destination may refuse them before anything else is sent."""

    kind: str
    """`arena`, `qemu` or `process`."""
    name: str
    details: dict[str, Any] = field(default_factory=dict)
    """Kind-specific facts worth a check or a message (QEMU version, machine type...)."""
