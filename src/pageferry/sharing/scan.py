"""Which small pages of some targets have an equal elsewhere: hashed a slice at a time, paced, large pages untouched.

The scan reads shared files through mappings of our own and anonymous memory by process_vm_readv(2); what is not in
memory is left out, but for what a restore is still to bring (S8): that is known by its signature, and stays where it
is. The findings are hints: pages are compared by whoever shares them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pageferry import values
from pageferry._engine import Mapping, PagerFlags, SharingScan, Space
from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.sharing import deferred_pages
from pageferry.sharing.deferred_pages import DeferredPages
from pageferry.sharing.events import ScanEvent
from pageferry.workloads.target import Area, Target

SLICE = 64 << 20
"""Bytes looked at between two looks at the clock, at the pace, and at Ctrl-C."""
PAGE_COST = 24
"""Bytes of ours that a page of theirs costs while a scan goes on."""
REPORT_EVERY = 0.1
"""Seconds between two events."""

ClassName = Literal["zero", "pattern", "inside", "across"]
CLASSES: tuple[ClassName, ...] = ("zero", "pattern", "inside", "across")


@dataclass(frozen=True, slots=True)
class Options:
    """How a scan is done."""

    memory: int = 256 << 20
    """Bytes that it may take itself; with more pages than that allows, contents are sampled by their hash."""
    every: int = 1
    """Look at every nth unit of 2 MiB only. Pages whose equals are all left out look unique then."""
    threads: int = 0
    """0: one for each CPU."""
    budget: float | None = None
    """Part of one CPU that it may use (0.01: 1 %); None: as fast as it can."""

    def __post_init__(self) -> None:
        checked = {
            "memory": values.size("memory", self.memory, 1 << 20, 1 << 50),
            "every": values.count("every", self.every, 1, 1 << 40),
            "threads": values.count("threads", self.threads, 0, 1024),
            "budget": values.optional(values.fraction, "budget", self.budget, 64.0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(slots=True)
class Place:
    """A piece of memory that is looked at: a region, or an anonymous area of a process."""

    workload: int
    """Number of the target."""
    target: Target
    area: Area | None
    """None: a region."""
    region: int | None
    start: int
    """Bytes: of the region, or an address."""
    length: int
    mapping: Mapping | None = None
    deferred: DeferredPages | None = None
    """Contents of the target that are still to come."""

    @property
    def anonymous(self) -> bool:
        """Whether it is private memory, which KSM can share."""
        return self.area is not None

    def engine_piece(self) -> tuple[int, Mapping | Space, int, int]:
        """As `SharingScan` takes it."""
        if self.area is not None:
            return self.workload, self.target.space(self.area.pid), self.start, self.length
        assert self.region is not None
        region = self.target.regions[self.region]
        self.mapping = Mapping(region.fd, region.length, region.file_offset)
        return self.workload, self.mapping, self.start, self.length

    def engine_deferred(self) -> tuple[PagerFlags, int, Sequence[bool]] | None:
        """As `SharingScan` takes it."""
        if self.deferred is None:
            return None
        assert self.region is not None
        return self.deferred.flags, self.deferred.first_pages[self.region], self.deferred.large[self.region]


@dataclass(frozen=True, slots=True)
class Unit:
    """What a 2 MiB unit (or the part of one that an area has) holds. Numbers are pages of 4 KiB."""

    number: int
    """In the scan."""
    place: Place
    start: int
    """Bytes of the region, or an address of the process."""
    length: int
    large: bool
    """Whether it stood on a large page when the scan began, or will when everything has come."""
    present: int
    deferred: int
    """Still to come, and known by their signatures."""
    shared: int
    """Shared already, by fork or KSM: not looked at."""
    zero: int
    pattern: int
    inside: int
    across: int

    @property
    def shareable(self) -> int:
        """Pages that have an equal elsewhere, or are zeros."""
        return self.zero + self.pattern + self.inside + self.across

    @property
    def possible(self) -> int:
        """Those of them that can be shared: all of private memory, zeros only of shared files on small-page tmpfs."""
        if self.place.anonymous:
            return self.shareable
        assert self.place.region is not None
        return self.zero if self.place.target.regions[self.place.region].page_size == SMALL_PAGE else 0


@dataclass(slots=True)
class Findings:
    """A finished scan."""

    targets: Sequence[Target]
    places: list[Place]
    units: list[Unit]
    pages: dict[ClassName, int]
    """Pages by class."""
    freed: dict[ClassName, int]
    """Pages that sharing all of them would free."""
    scale: int
    """One of how many contents was kept in mind."""
    every: int
    looked_at: int
    """Bytes."""
    seconds: float
    engine: SharingScan = field(repr=False)


async def look(targets: Sequence[Target], options: Options, listener: Callable[[ScanEvent], object]) -> Findings:
    """Scan the memory of targets; can be cancelled between slices.

    Raises WorkloadDied when a process ends meanwhile, UnsupportedError where one may not be looked at, RestoreError or
    ImageError where contents are still to come and nothing tells which.
    """
    places = list(_places(targets))
    begin = time.monotonic()
    try:
        pieces = [place.engine_piece() for place in places]
        deferred = {number: one for number, place in enumerate(places) if (one := place.engine_deferred()) is not None}
        scan = await in_thread(SharingScan, pieces, options.memory // PAGE_COST, options.every, deferred)
        looked_at = await _run(scan, options, listener)
        await in_thread(scan.finish)
        for target in targets:
            for pid in target.pids:
                target.check_alive(pid)  # one without memory any more looks as if it had none
    except ProcessLookupError as gone:
        raise WorkloadDied("a process ended while its memory was looked at") from gone
    except PermissionError as refused:
        raise UnsupportedError(f"memory may not be looked at: run as root ({refused})") from refused
    except OSError as error:
        raise WorkloadError(f"memory cannot be looked at: {error}") from error
    pages, freed = (dict(zip(CLASSES, numbers, strict=True)) for numbers in scan.totals)
    return Findings(
        targets=targets,
        places=places,
        units=list(_units(scan, places)),
        pages=pages,
        freed=freed,
        scale=scan.scale,
        every=options.every,
        looked_at=looked_at,
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
    """Seconds to sleep until `used` seconds of CPU are no more than the budget allows."""
    return max(used / budget - used / threads, 0.0)


def _places(targets: Sequence[Target]) -> Iterator[Place]:
    """Everything to be looked at. A file that several targets map is looked at once: its pages are shared already."""
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
    for number, (piece, start, length, large, *pages, counts) in enumerate(scan.units()):
        yield Unit(number, places[piece], start, length, large and length == LARGE_PAGE, *pages, *counts)
