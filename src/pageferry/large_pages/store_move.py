"""Phases of one reclaim to a cold store: drain, write, evict. `cold_store` describes their order and its reasons."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pageferry._engine import Advice, PageSet, PageStore, Trace
from pageferry.errors import CheckpointError, RestoreError, UsageError, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder
from pageferry.images import metadata, targets
from pageferry.images.image import ImageFile, new_file
from pageferry.large_pages.sampler import SLOTS
from pageferry.large_pages.store_plan import Plan, Unit, joined, segments
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.pager import client, records
from pageferry.pager.launcher import PagerProcess, dismiss
from pageferry.pager.records import Deferred, OwnImage
from pageferry.workloads.direct_io import registered_buffers
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.target import Target

PAUSE = 0.01
"""Target duration of the work in a pause, seconds. The time to pause and to resume the workload is not included."""
FIRST_BATCH = 4
"""Number of huge pages evicted in the first pause. The size of later batches is adapted to `PAUSE`."""
COPIED_AT_A_TIME = 32
"""Number of huge pages copied per engine call. A cancellation takes effect between the calls."""
MAX_IMAGES = 64
"""Maximum number of images in the chain of a store."""


@dataclass(slots=True)
class Stored:
    """Progress and results of a reclaim."""

    freed: int = 0
    """Decrease of the workload's files in memory, bytes."""
    broken: int = 0
    """Number of huge pages split."""
    pages: int = 0
    """Number of base pages added to the store and evicted."""
    written: int = 0
    """Number of base pages that stay because they were written after they had been copied."""
    path: str = ""
    length: int = 0
    """Length of the image, bytes."""
    equal: int = 0
    """Number of base pages of the image that are stored as duplicates of another page."""
    pauses: int = 0
    longest_pause: float = 0.0
    """Longest pause, seconds."""


@dataclass(slots=True, kw_only=True)
class Move:
    """Move of the planned pages of one workload to a store. `drain`, `write` and `evict` are called once each, in this
    order."""

    target: Target
    workload: Migratable
    folder: Folder
    memory: Memory
    plan: Plan
    trace: Trace
    """Write traces over every huge page of the plan."""
    record: Deferred | None
    """Record of the existing store; None if there is none."""
    done: Stored = field(default_factory=Stored)

    # -- draining

    async def drain(self) -> None:
        """Drain I/O that started before the traces were installed, because traces do not report its writes.

        Pages that stay pinned, in buffers registered with io_uring, stay in memory. When a buffer is registered later,
        the traces report its pages as written.
        """
        await self.workload.prepare_pause()
        begin = time.monotonic()
        try:
            await self.workload.pause()
            self.trace.collect(self.memory.page_sets())
            for kept, pinned in zip(self.plan.kept, registered_buffers(self.memory.regions), strict=True):
                kept.update(pinned)
        finally:
            await self.workload.resume()
        self._paused_since(begin)

    def _paused_since(self, begin: float) -> None:
        self.done.pauses += 1
        self.done.longest_pause = max(self.done.longest_pause, time.monotonic() - begin)

    # -- writing the store

    async def write(self, place: Path | None, codec: metadata.Codec) -> ImageFile:
        """Copy the cold pages to an image in `place`. Return the image, which is complete and synced. Raises
        CheckpointError if the image cannot be written, and the errors of `_directory`."""
        name, record = self.folder.name, self.record
        parent = targets.open_expected(record.image, record.identity, name) if record is not None else None
        path = self._directory(parent, place) / f"{name}.cold-{os.urandom(4).hex()}.img"
        try:
            with new_file(path) as file:
                await self._copy(file, parent, codec)
        except OSError as error:
            raise CheckpointError(
                f"cannot write the store {path}: {error.strerror or error}; the memory of {name} is unchanged: "
                "free some space, or use another directory with `store`"
            ) from error
        image = ImageFile(path)
        self.done.path, self.done.length = str(image.path), image.image.length
        self.done.equal = image.image.count(0, image.pages).same_as
        return image

    def _directory(self, parent: ImageFile | None, place: Path | None) -> Path:
        """Return the directory for a new image: that of `parent`, otherwise `place`, otherwise that of the workload.
        Raises UsageError if `place` is not the directory of `parent`, WorkloadError if the chain has MAX_IMAGES
        images."""
        name = self.folder.name
        if parent is not None and len(parent.links) >= MAX_IMAGES:
            raise WorkloadError(
                f"cannot move more memory of {name} to a store: the store has {MAX_IMAGES} images; reload it with "
                "`undo` first"
            )
        earlier = parent.path.parent if parent is not None else self.folder.path
        where = (place or earlier).absolute()
        if parent is not None and not (where.exists() and where.samefile(earlier)):
            raise UsageError(
                f"cannot change the store: memory of {name} is in a store in {earlier}; use that directory, or "
                "reload the memory with `undo` first"
            )
        return where

    async def _copy(self, file: int, parent: ImageFile | None, codec: metadata.Codec) -> None:
        mappings, units = self.memory.mappings, self.plan.units
        lengths = [len(one) // SMALL_PAGE for one in mappings]
        store = PageStore(file, os.urandom(16), lengths, codec=codec)
        for first in range(0, len(units), COPIED_AT_A_TIME):
            for number, pages in self.plan.pages(units[first : first + COPIED_AT_A_TIME]).items():
                copied = await in_thread(store.add, number, mappings[number], pages)
                pages.subtract(copied)
                self.plan.kept[number].update(pages)
        about = metadata.describe(
            self.workload.identity,
            self.memory.regions,
            created=time.time(),
            codec=codec,
            restorable=False,
            parent=parent.as_parent() if parent is not None else None,
        )
        chain = parent.chain if parent is not None else None
        await in_thread(store.finish, [(metadata.METADATA, metadata.encode(about))], chain)

    # -- evicting

    async def evict(self, image: ImageFile) -> None:
        """Start a pager process that serves the workload, and evict the copied pages in short pauses.

        The pager continues if this process is killed, so that the workload never waits for another pager.
        """
        pager = PagerProcess()
        try:
            await self._serve(pager, image)
        except BaseException:
            await asyncio.shield(in_thread(pager.give_up))
            raise
        try:
            await self._evict_in_batches(pager)
        except BaseException:
            with contextlib.suppress(RestoreError):
                await asyncio.shield(_leave(pager))
            raise
        await asyncio.shield(_leave(pager))

    async def _serve(self, pager: PagerProcess, image: ImageFile) -> None:
        """Make the new pager serve the workload, in place of the pager of the existing store."""
        await pager.open(image.path, self.folder.name, image.identity)
        work = self._work(image)
        if work.qmp_socket is None:
            self._keep_from_children(work)
        status = await in_thread(client.status, self.folder) if self.record is not None else None
        if status is not None:
            await dismiss(self.folder, status)
        await pager.serve(self.folder, work, taken_over=self.record is not None, evicting=True)

    async def _evict_in_batches(self, pager: PagerProcess) -> None:
        """Evict pages, one batch per pause, except those written since they were copied.

        The record of the store was written before this call. A program that hands out the descriptor of its memory
        first sets a mark (`records.is_handed_out`). Either the program then finds the record and has all pages
        reloaded, or this method finds the mark and stops.
        """
        numbers: defaultdict[Unit, list[int]] = defaultdict(list)
        for number, (unit, _) in enumerate(segments(self.workload, self.plan.units)):
            numbers[unit].append(number)
        units, written, size = self.plan.units, self.memory.page_sets(), FIRST_BATCH
        while units and not records.is_handed_out(self.folder):
            batch, units = units[:size], units[size:]
            await self.workload.prepare_pause()
            begin = time.monotonic()
            try:
                await self.workload.pause()
                fault_point("reclaim.paused")
                # Run this in the event loop's thread: no other task may resume the workload before it has ended.
                working = time.monotonic()
                self.trace.collect(written)
                for number in (number for unit in batch for number in numbers[unit]):
                    self.trace.release(number)
                self._evict_batch(pager, batch, written)
                worked = time.monotonic() - working
                fault_point("reclaim.evicted")
            finally:
                await self.workload.resume()
            self._paused_since(begin)
            size = max(1, min(4 * size, round(size * PAUSE / max(worked, 1e-4))))

    def _evict_batch(self, pager: PagerProcess, batch: Sequence[Unit], written: Sequence[PageSet]) -> None:
        done = self.done
        for region, pages in self.plan.pages(batch).items():
            pages.subtract(self.plan.kept[region])
            cold = len(pages)
            pages.subtract(written[region])
            done.written += cold - len(pages)
            broken = [unit for unit, count in enumerate(pages.unit_counts()) if count]
            done.broken += len(broken)
            self.plan.broken.update((region, unit * SLOTS) for unit in broken)
            done.pages += pager.evict(region, pages)

    def _keep_from_children(self, work: Deferred) -> None:
        """Exclude memory in a store from children of the program. They have no pager, so the memory would read as
        zeros."""
        assert work.cold is not None
        for region, parts in zip(self.workload.regions, work.cold, strict=True):
            for segment in region.segments:
                for part in segment.within(parts):
                    self.target.space(part.pid).madvise(part.address, part.length, Advice.DONTFORK)

    def _work(self, image: ImageFile) -> Deferred:
        """Return the record for a pager that takes over."""
        record, regions = self.record, self.workload.regions
        cold = record.cold if record is not None and record.cold is not None else [[] for _ in regions]
        added: list[list[tuple[int, int]]] = [[] for _ in regions]
        for region, first in self.plan.units:
            added[region].append((first * SMALL_PAGE, LARGE_PAGE))
        created = OwnImage(path=str(image.path.absolute()), identity=image.identity)
        return Deferred(
            image=created.path,
            identity=created.identity,
            own=[*(record.own if record is not None else []), created],
            qmp_socket=getattr(self.workload, "qmp_socket", None),
            regions=[records.record_of(region) for region in regions],
            userfaults=record.userfaults if record is not None else {},
            prefetch=False,
            eager=False,
            cold=[joined(sorted({*old, *new})) for old, new in zip(cold, added, strict=True)],
        )

    # -- restoring huge-page mappings

    def restore_mappings(self) -> None:
        """Restore the PMD mappings of traced huge pages that were not split.

        Split pages must be left out. A page that was evicted completely is backed by a huge page again as soon as one
        of its base pages is reloaded. If that huge page were mapped, the workload would read zeros from all other base
        pages, without faults.
        """
        large = self.memory.large_units()
        for (region, first), segment in segments(self.workload, self.plan.whole):
            if large[region][first // SLOTS]:
                with contextlib.suppress(OSError):
                    self.target.space(segment.pid).collapse(segment.address, segment.length)


def resident(memory: Memory) -> int:
    """Return the size of the workload's files in memory, bytes."""
    return sum(os.fstat(mapping.fileno()).st_blocks * 512 for mapping in memory.mappings)


async def _leave(pager: PagerProcess) -> None:
    """Detach from the pager, which continues without this process. If no page is deferred, wait until the pager has
    exited."""
    if await pager.end_evictions() == 0:
        await pager.wait_for_end()
        pager.close()
    else:
        pager.leave()
