"""Moves cold base pages from memory to a store: an image from which a pager reloads them on demand (S3, S10).

Correctness follows from the order (see `to_store`). Pages are copied while the workload runs with write traces
installed. The store is completed and synced. Then, in short pauses, pages that were not written since they were copied
are evicted. A pause before anything is copied drains I/O that is in flight: it bypasses page tables, and so the traces,
but I/O that starts later first marks its pages as written. An evicted page is reloaded by a pager on demand, by a later
checkpoint or migration (S8), or by `undo`.

Only the huge pages that were split are registered for faults. All others keep their mapping, and can be sampled and
reclaimed later; the store is then another image, with the previous one as its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pageferry._engine import PageSet, PageStore, Trace
from pageferry.errors import (
    CheckpointError,
    NoSuchWorkload,
    RestoreError,
    UnsupportedError,
    UsageError,
    WorkloadError,
)
from pageferry.host import proc, processes
from pageferry.host.blocking import in_thread
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder
from pageferry.host.smaps import spare_mappings
from pageferry.images import metadata, targets
from pageferry.images.image import ImageFile, new_file
from pageferry.large_pages.sampler import SLOTS, Activity, cold_runs
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE, Segment
from pageferry.memory.view import Memory
from pageferry.pager import client, page_faults, records
from pageferry.pager.launcher import dismiss, hand_over
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.process import GuestPager
from pageferry.pager.records import Deferred, OwnImage
from pageferry.workloads.deferred_access import wait_complete
from pageferry.workloads.direct_io import registered_buffers
from pageferry.workloads.folders import folder_of
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.target import Target

PAUSE = 0.01
"""Target for the work per pause, seconds; stopping and resuming add to it."""
FIRST_BATCH = 4
"""Huge pages evicted in the first pause; later batches are sized to fit `PAUSE`."""
COPIED_AT_A_TIME = 32
"""Huge pages copied per engine call, between which a cancellation takes effect."""
MAX_IMAGES = 64
"""Maximum number of images in the chain of a store."""

_SYS_MADVISE = 28
_MADV_DONTFORK = 10

Unit = tuple[int, int]
"""Huge page: (region number, its first page)."""


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
    """Number of base pages of the image that are stored as duplicates of another one."""
    pauses: int = 0
    longest_pause: float = 0.0
    """Longest pause, seconds."""


@dataclass(slots=True)
class _Plan:
    """Cold pages of the chosen huge pages."""

    cold: dict[Unit, list[tuple[int, int]]]
    """Runs of cold pages of the region, as (first, end), for each huge page in order."""
    kept: list[PageSet]
    """Cold pages, per region, that stay: they are pinned, or were not present when they were to be copied."""
    broken: set[Unit] = field(default_factory=set)
    """Huge pages of which at least one page was evicted."""

    @property
    def units(self) -> list[Unit]:
        """Huge pages, in order."""
        return list(self.cold)

    def pages(self, units: Sequence[Unit]) -> dict[int, PageSet]:
        """Return the cold pages of these huge pages, by region."""
        found: dict[int, PageSet] = {}
        for unit in units:
            pages = found.setdefault(unit[0], PageSet(self.kept[unit[0]].pages))
            for start, end in self.cold[unit]:
                pages.insert(start, end)
        return found


async def prepare(target: Target) -> None:
    """Prepare a target for sampling: complete its restore. Raises UnsupportedError if it cannot have a store."""
    if target.workload is None:
        raise UnsupportedError(
            f"cannot move memory of {target.name} to a store: it is not a managed workload and cannot be paused; "
            "adopt a running QEMU with `pageferry adopt`, or use `reclaim` swap"
        )
    folder = _folder(target.workload)
    _check_descriptor(folder)
    try:
        await in_thread(page_faults.check, target.pids)
    except CannotHandleFaults as refused:
        raise UnsupportedError(f"cannot move memory of {target.name} to a store: {refused}") from refused
    record = folder.load(records.RECORD, Deferred)
    if record is None or record.cold is None:
        await wait_complete(target.workload)


async def to_store(target: Target, idle: Sequence[Activity], place: Path | None, codec: metadata.Codec) -> Stored:
    """Split these huge pages of a workload, and move their cold base pages to a store.

    `place`: directory for it; None for the workload's directory in the run directory. If that is in memory, the gain is
    limited to what compression saves. The workload keeps running except for short pauses. No write is lost, regardless
    of errors.

    Raises CheckpointError (the store cannot be written; nothing has changed), WorkloadError, WorkloadDied.
    """
    workload = target.workload
    assert workload is not None
    folder = _folder(workload)
    with folder.exclusively("reclaim"):
        _check_descriptor(folder)
        record = await _record(folder)
        _remove_orphans(folder, record)
        memory = Memory(workload)
        plan = _plan(target, memory, idle)
        if not plan.cold:
            return Stored()
        before = _resident(memory)
        segments = _segments(workload, plan.units)
        spaces = {segment.pid: target.space(segment.pid) for _, segment in segments}
        trace = Trace(
            [(spaces[one.pid], one.address, one.length, unit[0], one.offset // SMALL_PAGE) for unit, one in segments]
        )
        try:
            done = Stored()
            await _drain(workload, trace, memory, plan, done)
            image = await _write(workload, folder, memory, plan, record, place, codec)
            done.path, done.length = str(image.path), image.image.length
            done.equal = image.image.count(0, image.pages)[3]
            fault_point("reclaim.stored")
            await _evict(target, workload, folder, memory, plan, trace, image, record, done)
            fault_point("reclaim.handed-over")
        finally:
            await in_thread(trace.remove)
            _restore_mappings(target, memory, [unit for unit in plan.units if unit not in plan.broken])
        done.freed = before - _resident(memory)
        return done


async def bring_back(target: Target) -> int:
    """Reload everything, onto huge pages, and remove the store. Return the number of bytes that were in it.

    Raises UsageError if there is no store, RestoreError if its pager has exited, ImageError if it is damaged.
    """
    if target.workload is None:
        raise UsageError(f"cannot undo: {target.name} is not a managed workload, and has no store")
    folder = _folder(target.workload)
    with folder.exclusively("the end of reclaim"):
        record = folder.load(records.RECORD, Deferred)
        status = await in_thread(client.status, folder)
        if record is None or record.cold is None or status is None:
            raise UsageError(f"cannot undo: {folder.name} has no memory in a store")
        started = proc.start_time(status.pager)
        await in_thread(client.wait_complete, folder)
        if started is not None:  # it still has to collapse the huge pages
            await processes.wait_for_end(status.pager, started)
        return status.deferred


# -- choosing what to store


def _check_descriptor(folder: Folder) -> None:
    if records.is_handed_out(folder):
        raise UnsupportedError(
            f"cannot move memory of {folder.name} to a store: its program has taken the descriptor of its memory "
            "(`fileno()`), and a mapping made with it would read zeros; use --reclaim swap"
        )


def _folder(workload: Migratable) -> Folder:
    folder = folder_of(workload)
    if folder is None:
        raise NoSuchWorkload(
            f"cannot move memory of {workload.name} to a store: it is not registered on this host; register it under "
            "a name"
        )
    return folder


async def _record(folder: Folder) -> Deferred | None:
    """Return the record of the existing store. Its pager must respond: threads that wait for a page must not wait for
    this."""
    record = folder.load(records.RECORD, Deferred)
    if record is not None and await in_thread(client.status, folder) is None:
        return None  # everything has just been reloaded
    return record


def _remove_orphans(folder: Folder, record: Deferred | None) -> None:
    """Remove the images of a reclaim that was killed before it had evicted anything."""
    if record is None:
        (folder.path / records.FLAGS).unlink(missing_ok=True)
    needed = {own.path for own in record.own} if record is not None else set()
    created = re.compile(rf"{re.escape(folder.name)}\.cold-[0-9a-f]{{8}}\.img")
    for path in folder.path.iterdir():
        if created.fullmatch(path.name) and str(path) not in needed:
            path.unlink()


def _plan(target: Target, memory: Memory, idle: Sequence[Activity]) -> _Plan:
    """Plan for the cold pages of shared huge pages, at most as many as the mapping limit allows: each costs two."""
    affordable = min((spare_mappings(pid) // 2 for pid in target.pids), default=0)
    cold: dict[Unit, list[tuple[int, int]]] = {}
    for activity in idle:
        area = activity.page.area
        runs = cold_runs(activity.touched) if activity.touched is not None else []
        if area.region is not None and area.page_size == SMALL_PAGE and runs and len(cold) < affordable:
            first = (area.offset + activity.page.address - area.address) // SMALL_PAGE
            cold[area.region, first] = [(first + start, first + end) for start, end in runs]
    return _Plan(dict(sorted(cold.items())), memory.page_sets())


def _segments(workload: Migratable, units: Sequence[Unit]) -> list[tuple[Unit, Segment]]:
    """Return every mapping of every huge page."""
    return [
        (unit, part)
        for unit in units
        for segment in workload.regions[unit[0]].segments
        for part in segment.within([(unit[1] * SMALL_PAGE, LARGE_PAGE)])
    ]


def _resident(memory: Memory) -> int:
    """Return the size of the workload's files in memory, bytes."""
    return sum(os.fstat(mapping.fileno()).st_blocks * 512 for mapping in memory.mappings)


# -- writing the store


async def _drain(workload: Migratable, trace: Trace, memory: Memory, plan: _Plan, done: Stored) -> None:
    """Drain I/O that had started before the traces were installed, which do not report its writes.

    Pages that stay pinned, in buffers registered with io_uring, are kept. A buffer that is registered later is reported
    by the traces as written.
    """
    await workload.prepare_pause()
    begin = time.monotonic()
    try:
        await workload.pause()
        trace.collect(memory.page_sets())
        for kept, pinned in zip(plan.kept, registered_buffers(memory.regions), strict=True):
            kept.update(pinned)
    finally:
        await workload.resume()
    done.pauses, done.longest_pause = 1, time.monotonic() - begin


async def _write(
    workload: Migratable,
    folder: Folder,
    memory: Memory,
    plan: _Plan,
    record: Deferred | None,
    place: Path | None,
    codec: metadata.Codec,
) -> ImageFile:
    """Copy the cold pages to an image, which is complete and synced on return."""
    parent = targets.open_expected(record.image, record.identity, folder.name) if record is not None else None
    if parent is not None and len(parent.links) >= MAX_IMAGES:
        raise WorkloadError(
            f"cannot move more memory of {folder.name} to a store: it has {MAX_IMAGES} images; reload them with "
            "`undo` first"
        )
    earlier = parent.path.parent if parent is not None else folder.path
    where = (place or earlier).absolute()
    if parent is not None and not (where.exists() and where.samefile(earlier)):
        raise UsageError(
            f"cannot change the store: memory of {folder.name} is in a store in {earlier}; use that directory, or "
            "reload the memory with `undo` first"
        )
    path = where / f"{folder.name}.cold-{secrets.token_hex(4)}.img"
    try:
        with new_file(path) as file:
            store = PageStore(file, secrets.token_bytes(16), [len(one) // SMALL_PAGE for one in memory.mappings], codec)
            for first in range(0, len(plan.cold), COPIED_AT_A_TIME):
                for number, pages in plan.pages(plan.units[first : first + COPIED_AT_A_TIME]).items():
                    copied = await in_thread(store.add, number, memory.mappings[number], pages)
                    pages.subtract(copied)
                    plan.kept[number].update(pages)
            about = metadata.describe(
                workload.identity,
                memory.regions,
                created=time.time(),
                codec=codec,
                restorable=False,
                parent=parent.as_parent() if parent is not None else None,
            )
            chain = parent.chain if parent is not None else None
            await in_thread(store.finish, [(metadata.METADATA, metadata.encode(about))], chain)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the store {path}: {error.strerror or error}; the memory of {folder.name} is unchanged: "
            "free some space, or use another directory with `store`"
        ) from error
    return ImageFile(path)


# -- evicting


async def _evict(
    target: Target,
    workload: Migratable,
    folder: Folder,
    memory: Memory,
    plan: _Plan,
    trace: Trace,
    image: ImageFile,
    record: Deferred | None,
    done: Stored,
) -> None:
    """Evict the pages in the store, in short pauses, with a pager in this process; then start a separate one."""
    work = _work(workload, image, plan.units, record)
    if work.qmp_socket is None:
        _keep_from_children(target, work)
    status = await in_thread(client.status, folder) if record is not None else None
    if status is not None:
        await dismiss(folder, status)
    pager = await in_thread(GuestPager, image, folder, work, record is not None, evicting=True)
    try:
        await _batches(workload, folder, memory, plan, trace, pager, done)
    except BaseException:
        with contextlib.suppress(RestoreError):
            await asyncio.shield(_leave(pager))
        raise
    await asyncio.shield(_leave(pager))


async def _leave(pager: GuestPager) -> None:
    """Hand over to a separate pager process."""
    if pager.pager.pending:
        fault_point("reclaim.handover")
        await hand_over(pager)
    else:  # nothing was evicted
        pager.pager.evicted()
        await in_thread(pager.run)
        await in_thread(pager.close)


async def _batches(
    workload: Migratable, folder: Folder, memory: Memory, plan: _Plan, trace: Trace, pager: GuestPager, done: Stored
) -> None:
    """Evict pages, one batch per pause, except those written since they were copied.

    The record of the store exists by now. A program that takes the descriptor of its memory either sees the record, and
    has everything reloaded, or its mark is seen here.
    """
    numbers: defaultdict[Unit, list[int]] = defaultdict(list)
    for number, (unit, _) in enumerate(_segments(workload, plan.units)):
        numbers[unit].append(number)
    units, written, size = plan.units, memory.page_sets(), FIRST_BATCH
    while units and not records.is_handed_out(folder):
        batch, units = units[:size], units[size:]
        await workload.prepare_pause()
        begin = time.monotonic()
        try:
            await workload.pause()
            fault_point("reclaim.paused")
            # Not in a thread: no other task may resume the workload in between.
            working = time.monotonic()
            trace.collect(written)
            for number in (number for unit in batch for number in numbers[unit]):
                trace.release(number)
            for region, pages in plan.pages(batch).items():
                pages.subtract(plan.kept[region])
                cold = len(pages)
                pages.subtract(written[region])
                done.written += cold - len(pages)
                broken = [unit for unit, count in enumerate(pages.unit_counts()) if count]
                done.broken += len(broken)
                plan.broken.update((region, unit * SLOTS) for unit in broken)
                done.pages += pager.pager.evict(region, pages)
            worked = time.monotonic() - working
            fault_point("reclaim.evicted")
        finally:
            await workload.resume()
        done.pauses, done.longest_pause = done.pauses + 1, max(done.longest_pause, time.monotonic() - begin)
        size = max(1, min(4 * size, round(size * PAUSE / max(worked, 1e-4))))


def _keep_from_children(target: Target, work: Deferred) -> None:
    """Exclude memory in a store from children of the program: they have no pager, so it would read as zeros there."""
    assert target.workload is not None
    assert work.cold is not None
    for region, parts in zip(target.workload.regions, work.cold, strict=True):
        for segment in region.segments:
            for part in segment.within(parts):
                target.space(part.pid).call(_SYS_MADVISE, part.address, part.length, _MADV_DONTFORK)


def _work(workload: Migratable, image: ImageFile, units: Sequence[Unit], record: Deferred | None) -> Deferred:
    """Return the record for a pager that takes over."""
    cold = record.cold if record is not None and record.cold is not None else [[] for _ in workload.regions]
    added = [[(first * SMALL_PAGE, LARGE_PAGE) for region, first in units if region == n] for n in range(len(cold))]
    created = OwnImage(path=str(image.path.absolute()), identity=image.identity)
    return Deferred(
        image=created.path,
        identity=created.identity,
        own=[*(record.own if record is not None else []), created],
        qmp_socket=getattr(workload, "qmp_socket", None),
        regions=[records.record_of(region) for region in workload.regions],
        userfaults=record.userfaults if record is not None else {},
        prefetch=False,
        eager=False,
        cold=[_joined(sorted({*old, *new})) for old, new in zip(cold, added, strict=True)],
    )


def _joined(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent and overlapping parts."""
    found: list[tuple[int, int]] = []
    for start, length in parts:
        if found and sum(found[-1]) >= start:
            found[-1] = (found[-1][0], max(sum(found[-1]), start + length) - found[-1][0])
        else:
            found.append((start, length))
    return found


def _restore_mappings(target: Target, memory: Memory, units: Sequence[Unit]) -> None:
    """Map huge pages that were traced, but not split, as huge pages again.

    Split ones must be left out: a page that was evicted completely is backed by a huge page again as soon as one base
    page is reloaded, and mapping that would show zeros for all others, bypassing their userfaultfd.
    """
    assert target.workload is not None
    large = memory.large_units()
    for (region, first), segment in _segments(target.workload, units):
        if large[region][first // SLOTS]:
            with contextlib.suppress(OSError):
                target.space(segment.pid).collapse(segment.address, segment.length)
