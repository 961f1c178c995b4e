"""Sampling window over chosen huge pages: split their mappings, observe accesses to base pages, restore the mappings.

For shared memory, the accessed base pages are known exactly. For private memory, only their number is known (from the
accessed bits, as counted in smaps). Private memory is sampled in two windows, because restoring a split mapping costs a
copy of the page. The first window samples whole huge pages, which is cheap, and finds those without accesses. The
second window samples only the other pages, with their mappings split.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pageferry._engine import Sampler, SplitPage
from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.smaps import referenced
from pageferry.memory import bitmaps
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.workloads.target import Area, Target

SLOTS = LARGE_PAGE // SMALL_PAGE
AGAIN = 2
"""Maximum number of additional windows for pages that DAMON may have sampled."""


@dataclass(frozen=True, slots=True)
class LargePage:
    """Huge page as mapped by one process."""

    area: Area
    address: int
    others: tuple[tuple[int, int], ...] = ()
    """Other mappings of the page in the target, as (pid, address). Accesses through them count too."""

    @property
    def mappings(self) -> tuple[tuple[int, int], ...]:
        """All mappings of the page, as (pid, address)."""
        return ((self.area.pid, self.address), *self.others)


@dataclass(frozen=True, slots=True)
class Activity:
    """Accesses to a huge page observed in a window."""

    page: LargePage
    count: int
    """Number of base pages accessed, of 512."""
    touched: int | None
    """Accessed base pages as bits (bit n for base page n); None if only their number is known."""


def cold_runs(touched: int) -> list[tuple[int, int]]:
    """Return the runs of base pages of a huge page that were not accessed, as (first, last + 1)."""
    return bitmaps.runs(not touched >> slot & 1 for slot in range(SLOTS))


class Tracker:
    """Tracker that runs windows over the huge pages of a target. The end of its `with` block restores all mappings."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.cpu = 0.0
        """CPU time used for sampling, seconds."""
        self.restored = 0
        """Number of huge mappings that were split and have been restored."""
        self.small: list[SplitPage] = []
        """Huge mappings that could not be restored, each with the reason."""
        self._samplers: dict[int, Sampler] = {}
        self._split: set[tuple[int, int]] = set()

    def large_pages(self) -> list[LargePage]:
        """Return all pages that are mapped huge now, except those of hugetlbfs, which cannot be split."""
        found: list[LargePage] = []
        known: set[tuple[int, int]] = set()
        for area in self.target.areas:
            if area.page_size != SMALL_PAGE or not area.large_pages():
                continue
            for start, end in self._large_mapped(area):
                pages = [
                    LargePage(area, address, self._others(area, address)) for address in range(start, end, LARGE_PAGE)
                ]
                found += [page for page in pages if not known.intersection(page.mappings)]
                known.update(mapping for page in pages for mapping in page.mappings)
        return found

    def _others(self, area: Area, address: int) -> tuple[tuple[int, int], ...]:
        """Return the other mappings of a page of a shared file."""
        if area.region is None:
            return ()
        position = area.offset + address - area.address
        return tuple(
            (other.pid, other.address + position - other.offset)
            for other in self.target.areas
            if other is not area
            and other.region == area.region
            and other.large_pages()
            and other.offset <= position <= other.offset + other.length - LARGE_PAGE
        )

    def _large_mapped(self, area: Area) -> list[tuple[int, int]]:
        try:
            return self.target.space(area.pid).large_mapped(area.address, area.length)
        except OSError as error:
            raise self._explained(error, area.pid) from error

    async def window(self, pages: Sequence[LargePage], seconds: float) -> list[Activity]:
        """Return the activity of pages in a window of `seconds`. No two pages of private memory may be adjacent.

        Raises WorkloadDied if a process exits, WorkloadError if another command operates on its memory. All mappings
        are restored in any case.
        """
        shared = [page for page in pages if page.area.kind == "shared"]
        private = [page for page in pages if page.area.kind == "anon"]
        # Sample the kinds one after the other, so that neither stays split during the window of the other.
        return [*await self._window_shared(shared, seconds), *await self._window_private(private, seconds)]

    async def _window_shared(self, pages: list[LargePage], seconds: float) -> list[Activity]:
        if not pages:
            return []
        with self:
            pages = self._hold(pages, split=True)
            await asyncio.sleep(seconds)
            begin = time.thread_time()
            found = self._exact(pages)
            self.cpu += time.thread_time() - begin
        return found

    async def _window_private(self, pages: list[LargePage], seconds: float) -> list[Activity]:
        if not pages:
            return []
        with self:
            pages = self._hold(pages, split=False)
            await asyncio.sleep(seconds)
            begin = time.thread_time()
            accessed = self._referenced(pages)
            self.cpu += time.thread_time() - begin
            busy = [page for page in pages if accessed[page]]
            self._split_private(busy)
            counts = await self._counts(busy, seconds) if busy else {}
        return [Activity(page, counts.get(page, 0), None if page in counts else 0) for page in pages]

    def _hold(self, pages: list[LargePage], *, split: bool) -> list[LargePage]:
        """Start to observe those of the pages that still exist, and return them."""
        begin = time.thread_time()
        lost: set[tuple[int, int]] = set()
        for pid, addresses in _by_process(pages).items():
            try:
                sampler = self._sampler(pid)
                gone = sampler.hold(addresses)
                lost.update((pid, address) for address in gone)
                addresses = [address for address in addresses if address not in gone]
                if split:
                    self._split.update((pid, address) for address in addresses)
                    sampler.split(addresses, marked=True)
                else:
                    sampler.cool(addresses)
            except OSError as error:
                raise self._explained(error, pid) from error
        self.cpu += time.thread_time() - begin
        return [page for page in pages if not lost.intersection(page.mappings)]

    def _split_private(self, pages: list[LargePage]) -> None:
        begin = time.thread_time()
        for pid, addresses in _by_process(pages).items():
            try:
                self._split.update((pid, address) for address in addresses)
                self._samplers[pid].split(addresses, marked=False)
                self._samplers[pid].cool(addresses)
            except OSError as error:
                raise self._explained(error, pid) from error
        self.cpu += time.thread_time() - begin

    async def _counts(self, pages: list[LargePage], seconds: float) -> dict[LargePage, int]:
        """Return the number of base pages accessed in a window, for huge pages whose mappings have been split and whose
        accessed bits have been cleared.

        DAMON, if it runs, samples huge pages as a whole: it clears the accessed bits and marks the page as young, so
        the whole page counts as accessed. Pages with 512 accesses therefore get up to two more windows.
        """
        counts = dict.fromkeys(pages, SLOTS)
        for _ in range(1 + AGAIN):
            await asyncio.sleep(seconds)
            begin = time.thread_time()
            seen = self._referenced(pages)
            counts |= {page: min(counts[page], seen.get(page, 0)) for page in pages}
            pages = [page for page in pages if counts[page] == SLOTS]
            self.cpu += time.thread_time() - begin
            if not pages or not _damon_runs():
                break
            self._cool(pages)
        return counts

    def _cool(self, pages: list[LargePage]) -> None:
        begin = time.thread_time()
        for pid, addresses in _by_process(pages).items():
            try:
                self._samplers[pid].cool(addresses)
            except OSError as error:
                raise self._explained(error, pid) from error
        self.cpu += time.thread_time() - begin

    def _sampler(self, pid: int) -> Sampler:
        if pid not in self._samplers:
            self._samplers[pid] = Sampler(self.target.space(pid))
        self.target.check_alive(pid)
        return self._samplers[pid]

    def _exact(self, pages: list[LargePage]) -> list[Activity]:
        """Return the accesses to pages of shared memory, over all mappings in the target."""
        touched: dict[tuple[int, int], int] = {}
        for pid, addresses in _by_process(pages).items():
            try:
                seen = self._samplers[pid].touched(addresses)
            except OSError as error:
                raise self._explained(error, pid) from error
            for address, bits in zip(addresses, seen, strict=True):
                touched[pid, address] = int.from_bytes(bits, "little")
        found = []
        for page in pages:
            union = 0
            for mapping in page.mappings:
                union |= touched[mapping]
            found.append(Activity(page, union.bit_count(), union))
        return found

    def _referenced(self, pages: list[LargePage]) -> dict[LargePage, int]:
        """Return, by huge page, the number of base pages accessed since their accessed bits were cleared. Each huge
        page is a separate mapping during the window. If the workload has changed this mapping, the page counts as fully
        accessed.
        """
        counts: dict[LargePage, int] = {}
        for pid, addresses in _by_process(pages).items():
            seen = referenced(pid, addresses, LARGE_PAGE)
            counts |= {page: seen.get(page.address, LARGE_PAGE) // SMALL_PAGE for page in pages if page.area.pid == pid}
        return counts

    def _explained(self, error: OSError, pid: int) -> Exception:
        name = self.target.name
        if isinstance(error, ProcessLookupError):
            return WorkloadDied(f"{name}: process {pid} has exited")
        if isinstance(error, PermissionError):
            return UnsupportedError(f"cannot sample memory of {name}: process {pid}: {error}; run as root")
        if error.errno == errno.EBUSY:
            return WorkloadError(
                f"cannot sample memory of {name}: another command is using that of process {pid} ({error}); retry when "
                "that command has finished"
            )
        return WorkloadError(f"cannot sample memory of {name}: process {pid}: {error}")

    def _restore(self, pids: set[int]) -> None:
        begin = time.thread_time()
        for pid in pids & self._samplers.keys():
            small = self._samplers[pid].restore()
            self.small += small
        self.cpu += time.thread_time() - begin

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        before = len(self.small)
        self._restore(set(self._samplers))
        self.restored += len(self._split) - (len(self.small) - before)
        self._split.clear()


@functools.cache
def _damon_runs() -> bool:
    """Return whether DAMON monitors physical memory (the kernel thread kdamond runs)."""
    return any(proc.kernel_thread(b"kdamond", pid) for pid in proc.pids())


def _by_process(pages: list[LargePage]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for page in pages:
        for pid, address in page.mappings:
            found.setdefault(pid, []).append(address)
    return found
