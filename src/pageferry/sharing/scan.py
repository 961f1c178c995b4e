"""Scan for duplicate base pages: memory is hashed in slices, at a limited rate, without splitting huge pages.

Shared files are read through mappings in this process, anonymous memory with process_vm_readv(2). Pages that are not
present are skipped, except those that a restore has deferred (S8): their signatures are known, and they are not loaded.
The findings are hints: sharing compares the pages again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pageferry._engine import ClassCounts, Mapping, PagerFlags, SharingScan, Space
from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.sharing import deferred_pages
from pageferry.sharing.deferred_pages import DeferredPages
from pageferry.sharing.events import ScanEvent
from pageferry.sharing.options import Options
from pageferry.workloads.target import Area, Target

SLICE = 64 << 20
"""Number of bytes scanned per step. Between steps, the budget is applied and a cancellation takes effect."""
PAGE_COST = 24
"""Memory that the scan needs per scanned page, bytes."""
REPORT_EVERY = 0.1
"""Interval of events, seconds."""

ClassName = Literal["zero", "pattern", "inside", "across"]
CLASSES: tuple[ClassName, ...] = ("zero", "pattern", "inside", "across")


@dataclass(slots=True)
class Place:
    """Memory to scan: a region, or an anonymous area of a process."""

    workload: int
    """Index of the target, in the order of the scan."""
    target: Target
    area: Area | None
    """Anonymous area; None for a region."""
    region: int | None
    start: int
    """Offset in the region, or address, bytes."""
    length: int
    mapping: Mapping | None = None
    deferred: DeferredPages | None = None
    """Deferred contents of the target; None for anonymous memory, and if there are none."""

    @property
    def anonymous(self) -> bool:
        """Whether the memory is private; KSM shares private memory only."""
        return self.area is not None

    def engine_piece(self) -> tuple[int, Mapping | Space, int, int]:
        """Return the arguments of `SharingScan` for this memory."""
        if self.area is not None:
            return self.workload, self.target.space(self.area.pid), self.start, self.length
        assert self.region is not None
        region = self.target.regions[self.region]
        self.mapping = Mapping(region.fd, region.length, region.file_offset)
        return self.workload, self.mapping, self.start, self.length

    def engine_deferred(self) -> tuple[PagerFlags, int, Sequence[bool]] | None:
        """Return the arguments of `SharingScan` for the deferred contents of this memory; None if there are none."""
        if self.deferred is None:
            return None
        assert self.region is not None
        return self.deferred.flags, self.deferred.first_pages[self.region], self.deferred.large[self.region]


@dataclass(frozen=True, slots=True)
class Unit:
    """Contents of a 2 MiB unit, or of the part of a unit that belongs to an area. Counts are of base pages."""

    number: int
    """Index of the unit in the scan."""
    place: Place
    start: int
    """Offset in the region, or address in the process, bytes."""
    length: int
    large: bool
    """Whether the unit was backed by a huge page when the scan began, or will be when all of its pages are loaded."""
    present: int
    deferred: int
    """Number of deferred pages, whose signatures are known."""
    shared: int
    """Number of pages already shared, by fork or KSM. These pages are not scanned."""
    zero: int
    pattern: int
    inside: int
    across: int

    @property
    def shareable(self) -> int:
        """Number of pages that have duplicates or are zeros."""
        return self.zero + self.pattern + self.inside + self.across

    @property
    def possible(self) -> int:
        """Number of shareable pages that can be shared on this host: in private memory, all of them; in a shared file,
        the zero pages if the page size is 4 KiB, otherwise none."""
        if self.place.anonymous:
            return self.shareable
        assert self.place.region is not None
        return self.zero if self.place.target.regions[self.place.region].page_size == SMALL_PAGE else 0


@dataclass(slots=True)
class Findings:
    """Results of a scan."""

    targets: Sequence[Target]
    places: list[Place]
    units: list[Unit]
    pages: dict[ClassName, int]
    """Number of pages by class."""
    freed: dict[ClassName, int]
    """Number of pages that sharing would free, by class."""
    scale: int
    """Sampling ratio N: one of N contents was recorded."""
    every: int
    scanned: int
    """Scanned memory, bytes."""
    seconds: float
    engine: SharingScan = field(repr=False)


async def look(targets: Sequence[Target], options: Options, listener: Callable[[ScanEvent], object]) -> Findings:
    """Scan the memory of targets, and return the findings. A cancellation takes effect between slices.

    Raises WorkloadDied if a process exits, UnsupportedError without permission to read its memory, and WorkloadError
    for other failures. Raises RestoreError or ImageError if contents are deferred and cannot be determined.
    """
    places = list(_places(targets))
    begin = time.monotonic()
    try:
        pieces = [place.engine_piece() for place in places]
        deferred = {number: one for number, place in enumerate(places) if (one := place.engine_deferred()) is not None}
        scan = await in_thread(SharingScan, pieces, options.memory // PAGE_COST, options.every, deferred)
        scanned = await _run(scan, options, listener)
        await in_thread(scan.finish)
        for target in targets:
            for pid in target.pids:
                target.check_alive(pid)  # an exited process reads as one without memory
    except ProcessLookupError as gone:
        raise WorkloadDied("cannot scan memory: a process exited during the scan") from gone
    except PermissionError as refused:
        raise UnsupportedError(f"cannot scan memory: permission denied ({refused}); run as root") from refused
    except OSError as error:
        raise WorkloadError(f"cannot scan memory: {error}") from error
    return Findings(
        targets=targets,
        places=places,
        units=list(_units(scan, places)),
        pages=_by_class(scan.totals.pages),
        freed=_by_class(scan.totals.freed),
        scale=scan.scale,
        every=options.every,
        scanned=scanned,
        seconds=time.monotonic() - begin,
        engine=scan,
    )


async def _run(scan: SharingScan, options: Options, listener: Callable[[ScanEvent], object]) -> int:
    total, done, reported = scan.remaining, 0, 0.0
    threads = options.threads or len(os.sched_getaffinity(0))
    if options.budget is not None and options.budget < 1:
        threads = 1
    while True:
        cpu = time.process_time()
        step = await in_thread(scan.step, SLICE, threads)
        if not step:
            return done
        done += step
        if time.monotonic() - reported > REPORT_EVERY:
            reported = time.monotonic()
            listener(ScanEvent(done=done, total=total))
        if options.budget is not None:
            await asyncio.sleep(_rest(time.process_time() - cpu, options.budget, threads))


def _rest(used: float, budget: float, threads: int) -> float:
    """Return the seconds to sleep after `used` seconds of CPU time, to stay within the budget."""
    return max(used / budget - used / threads, 0.0)


def _places(targets: Sequence[Target]) -> Iterator[Place]:
    """Yield all memory to scan. A file that several targets map is scanned once, because its pages are shared
    already."""
    known: set[tuple[int, int]] = set()
    for number, target in enumerate(targets):
        still = deferred_pages.look(target.workload) if target.workload is not None else None
        for index, region in enumerate(target.regions):
            status = os.fstat(region.fd)
            identity = (status.st_dev, status.st_ino)
            if identity not in known:
                known.add(identity)
                yield Place(number, target, None, index, 0, region.length, deferred=still)
        for area in target.areas:
            if area.kind == "anon":
                yield Place(number, target, area, None, area.address, area.length)


def _units(scan: SharingScan, places: Sequence[Place]) -> Iterator[Unit]:
    for number, one in enumerate(scan.units()):
        counts = one.counts
        yield Unit(
            number,
            places[one.piece],
            one.position,
            one.length,
            one.large and one.length == LARGE_PAGE,
            one.present,
            one.deferred,
            one.shared,
            counts.zero,
            counts.pattern,
            counts.inside,
            counts.across,
        )


def _by_class(counts: ClassCounts) -> dict[ClassName, int]:
    return {name: getattr(counts, name) for name in CLASSES}
