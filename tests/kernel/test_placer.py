"""Population (S1, S5): complete units are mapped before the workload runs, and incomplete units are never mapped.

`Target.order("touch", ...)` counts the page faults of the process that maps the memory.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from pageferry._engine import (
    LARGE_PAGE,
    SMALL_PAGE,
    BlockReceiver,
    BlockSender,
    MappedSegment,
    Mapping,
    PageSet,
    Placer,
    Space,
    TargetRegion,
)
from tests.kernel.backing import KINDS, backing
from tests.kernel.target import Target

SLOTS = LARGE_PAGE // SMALL_PAGE
LENGTH = 6 * LARGE_PAGE
PAGES = LENGTH // SMALL_PAGE


class Move:
    """Source and destination of one region, and a process that maps the memory of the destination."""

    def __init__(
        self, source: int, copy: int, target: Target, workers: int, length: int = LENGTH, zeros: bool = False
    ) -> None:
        self.source, self.copy, self.target = Mapping(source, length), Mapping(copy, length), target
        self.address = target.order("map", copy, length)
        page_size = os.fstatvfs(copy).f_bsize
        memory = memoryview(self.source).cast("B")
        for page in range(self.pages):
            memory[page * SMALL_PAGE] = page % 3 if zeros else 1 + page % 3
        memory.release()
        large = self.source.large_units()
        segments = [MappedSegment(Space(target.pid), self.address, length)]
        self.placer = Placer([TargetRegion(self.copy, page_size, large)], segments, workers=workers)
        ends = socket.socketpair()
        self.sender = BlockSender([ends[0].fileno()])
        self.receiver = BlockReceiver([ends[1].fileno()], self.placer)
        for end in ends:
            end.close()
        self._round = 0

    @property
    def pages(self) -> int:
        return self.source.length // SMALL_PAGE

    def send(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Send ranges of pages in one round, and wait until the destination has received them."""
        pages = PageSet(self.pages)
        for start, end in ranges:
            pages.insert(start, end)
        sending = threading.Thread(target=self.sender.send, args=([self.source], [pages], self._round))
        sending.start()
        self.receiver.receive(self._round)
        sending.join()
        self._round += 1

    def faults(self, pages: int | None = None, *, write: bool = True) -> int:
        count = self.target.order("touch", self.address, self.pages if pages is None else pages, write)
        assert isinstance(count, int)
        return count


@contextmanager
def moving(kind: str, *, workers: int = 2, length: int = LENGTH, zeros: bool = False) -> Iterator[Move]:
    with backing(kind, length, 2) as (source, copy), Target(copy) as target:
        yield Move(source, copy, target, workers, length, zeros)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_no_fault_is_left_after_population(kind: str, workers: int) -> None:
    with moving(kind, workers=workers) as move:
        move.send([(0, PAGES)])
        assert move.placer.missing == 0
        move.placer.finish(populate_rest=True)
        assert move.faults(write=False) == 0
        assert move.faults() == 0
        populated = move.placer.populated
        assert populated.failed == 0
        assert populated.seconds > 0
        expected = {"small": (0, PAGES), "large": (LENGTH // LARGE_PAGE, 0), "hugetlb": (0, LENGTH // LARGE_PAGE)}
        if kind != "large" or workers:
            assert (populated.large, populated.small) == expected[kind]


def counts(placer: Placer) -> tuple[int, int, int]:
    """Return the numbers of populated huge pages, populated base pages and failures."""
    populated = placer.populated
    return populated.large, populated.small, populated.failed


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_with_memory_are_populated(kind: str) -> None:
    """Zeros in huge pages are allocated. Zero base pages are holes at the destination, and each causes a fault."""
    with moving(kind, zeros=True) as move:
        move.send([(0, PAGES)])
        move.placer.finish(populate_rest=True)
        assert move.faults() == (PAGES // 3 if kind == "small" else 0)


def test_without_population_every_page_is_a_fault() -> None:
    """Control experiment: the faults that the other tests exclude do occur without population."""
    with moving("small", workers=0) as move:
        move.send([(0, PAGES)])
        move.placer.finish(populate_rest=False)
        assert move.faults() > PAGES // 32


@pytest.mark.parametrize("kind", ["small", "large"])
def test_unit_with_a_missing_slot_is_not_mapped(kind: str) -> None:
    with moving(kind) as move:
        move.send([(0, SLOTS - 1), (SLOTS, PAGES)])
        assert move.placer.missing == 1
        move.placer.populate(0, list(range(6)))
        move.placer.finish(populate_rest=True)
        # No page of the first unit is mapped. The exact number of faults varies: one fault may map several base pages.
        assert move.faults(SLOTS, write=False) > 0
        assert move.placer.populated.large == (5 if kind == "large" else 0)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_pages_received_after_population_are_visible(kind: str) -> None:
    with moving(kind) as move:
        move.send([(0, PAGES)])
        move.placer.finish(populate_rest=True)
        memory = memoryview(move.source).cast("B")
        for byte in (200, 0, 201):
            for page in range(0, PAGES, 5):
                memory[page * SMALL_PAGE] = byte
            move.send([(page, page + 1) for page in range(0, PAGES, 5)])
        memory.release()
        assert bytes(memoryview(move.copy)) == bytes(memoryview(move.source))
        assert move.faults() == 0, "mapped pages must not be replaced"


def test_rounds_overwrite_while_workers_populate() -> None:
    with moving("large", length=32 * LARGE_PAGE) as move:
        memory = memoryview(move.source).cast("B")
        for number in range(4):
            for page in range(number, move.pages, 3):
                memory[page * SMALL_PAGE + 1] = number
            move.send([(0, move.pages)])
        memory.release()
        move.placer.finish(populate_rest=True)
        assert bytes(memoryview(move.copy)) == bytes(memoryview(move.source))
        assert move.copy.large_units() == [True] * 32
        assert move.faults() == 0
        assert counts(move.placer) == (32, 0, 0)


def test_modified_units_are_populated_on_demand() -> None:
    with moving("large", workers=0) as move:
        move.send([(0, PAGES)])
        move.placer.populate(0, [0, 2])
        assert counts(move.placer) == (2, 0, 0)
        assert move.faults(SLOTS) == 0
        assert move.faults() == 4, "expected one fault per remaining huge page"


def test_holes_are_not_populated() -> None:
    with backing("small", LENGTH, 2) as (source, copy), Target(copy) as target:
        move = Move(source, copy, target, 2)
        move.send([(0, SLOTS), (4 * SLOTS, PAGES)])
        move.placer.finish(populate_rest=True)
        assert move.copy.data_ranges() == [(0, LARGE_PAGE), (4 * LARGE_PAGE, LENGTH)]


def test_partly_mapped_region_is_populated_where_mapped() -> None:
    """If a segment ends within a unit, whole units are populated as huge pages, the remaining pages as base pages."""
    with backing("large", LENGTH, 2) as (source, copy), Target(copy) as target:
        move = Move(source, copy, target, 0)
        length = LENGTH - LARGE_PAGE // 2
        segments = [MappedSegment(Space(target.pid), move.address, length)]
        placer = Placer([TargetRegion(move.copy, SMALL_PAGE, move.source.large_units())], segments, workers=1)
        move.placer.finish(populate_rest=False)
        ends = socket.socketpair()
        move.sender = BlockSender([ends[0].fileno()])
        move.receiver = BlockReceiver([ends[1].fileno()], placer)
        move.send([(0, PAGES)])
        placer.finish(populate_rest=True)
        assert counts(placer) == (5, SLOTS // 2, 1)
        assert move.faults(PAGES - SLOTS // 2) == 0
        for end in ends:
            end.close()


def test_unknown_regions_and_units_are_refused() -> None:
    with backing("small", LENGTH) as (fd,):
        mapping = Mapping(fd, LENGTH)
        placer = Placer([TargetRegion(mapping, SMALL_PAGE)], [])
        for region, unit in [(0, 6), (1, 0), (0, 1 << 60)]:
            with pytest.raises(ValueError, match="region"):
                placer.populate(region, [unit])
        with pytest.raises(OSError, match="segment of region 1: only 1 regions given"):
            Placer([TargetRegion(mapping, SMALL_PAGE)], [MappedSegment(Space(), mapping.address, LENGTH, 1)])
