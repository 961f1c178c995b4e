"""Move of cold base pages from memory to a store: an image from which a pager reloads them on demand (S3, S10).

Correctness follows from the order (see `to_store`). Pages are copied while the workload runs with write traces
installed. The store is completed and synced. Then, in short pauses, pages that were not written since they were copied
are evicted. Before any page is copied, a pause drains I/O in flight, which bypasses page tables and thus the traces.
I/O that starts after this pause first marks its pages as written. A pager reloads an evicted page on demand, for a
later checkpoint or migration (S8), or for `undo`.

Only the huge pages that were split are registered for faults. All other huge pages keep their mapping, and can be
sampled and reclaimed later. A later reclaim creates another image, with the previous image as its parent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pageferry._engine import MappedSegment, Trace
from pageferry.errors import NoSuchWorkload, UnsupportedError, UsageError
from pageferry.host import proc, processes
from pageferry.host.blocking import in_thread
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder
from pageferry.images import metadata
from pageferry.large_pages.sampler import Activity
from pageferry.large_pages.store_move import Move, Stored, resident
from pageferry.large_pages.store_plan import Plan, plan, segments
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.pager import client, page_faults, records
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.records import Deferred
from pageferry.workloads.deferred_access import wait_complete
from pageferry.workloads.folders import folder_of
from pageferry.workloads.protocols import Migratable
from pageferry.workloads.target import Target


async def prepare(target: Target) -> None:
    """Prepare a target for sampling: complete its restore. Raises UnsupportedError if the target cannot have a store,
    NoSuchWorkload if it is not registered."""
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

    `place`: directory for the store; None for the workload's directory in the run directory. If the directory is in
    memory, the gain is limited to what compression saves. The workload keeps running except for short pauses. No write
    is lost, regardless of errors.

    Raises CheckpointError if the store cannot be written (nothing has changed then), UsageError, WorkloadError,
    WorkloadDied.
    """
    workload = target.workload
    assert workload is not None
    folder = _folder(workload)
    with folder.exclusively("reclaim"):
        _check_descriptor(folder)
        record = await _record(folder)
        _remove_orphans(folder, record)
        memory = Memory(workload)
        chosen = plan(target, memory, idle)
        if not chosen.cold:
            return Stored()
        before = resident(memory)
        trace = _trace(target, workload, chosen)
        move = Move(
            target=target, workload=workload, folder=folder, memory=memory, plan=chosen, trace=trace, record=record
        )
        try:
            await move.drain()
            image = await move.write(place, codec)
            fault_point("reclaim.stored")
            await move.evict(image)
            fault_point("reclaim.handed-over")
        finally:
            await in_thread(trace.remove)
            move.restore_mappings()
        move.done.freed = before - resident(memory)
        return move.done


def _trace(target: Target, workload: Migratable, chosen: Plan) -> Trace:
    """Install write traces over every mapping of the planned huge pages."""
    mapped = segments(workload, chosen.units)
    spaces = {segment.pid: target.space(segment.pid) for _, segment in mapped}
    return Trace(
        [
            MappedSegment(spaces[one.pid], one.address, one.length, unit[0], one.offset // SMALL_PAGE)
            for unit, one in mapped
        ]
    )


async def bring_back(target: Target) -> int:
    """Reload all pages that are in the store, and wait until the pager has collapsed them to huge pages and removed the
    store. Return the number of bytes that were in the store.

    Raises UsageError if there is no store, RestoreError if its pager has exited, ImageError if it is damaged.
    """
    if target.workload is None:
        raise UsageError(f"cannot reload memory of {target.name}: it is not a managed workload, and has no store")
    folder = _folder(target.workload)
    with folder.exclusively("a reload from the store"):
        record = folder.load(records.RECORD, Deferred)
        status = await in_thread(client.status, folder)
        if record is None or record.cold is None or status is None:
            raise UsageError(f"cannot reload memory of {folder.name}: none of it is in a store")
        started = proc.start_time(status.pager)
        await in_thread(client.wait_complete, folder)
        if started is not None:  # the pager still has to collapse huge pages
            await processes.wait_for_end(status.pager, started)
        return status.deferred


def _check_descriptor(folder: Folder) -> None:
    if records.is_handed_out(folder):
        raise UnsupportedError(
            f"cannot move memory of {folder.name} to a store: its program has obtained the descriptor of its "
            "memory (`fileno()`), and a mapping of that descriptor would show zeros; use `reclaim` swap"
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
    """Return the record of the existing store; None if there is none. Raises RestoreError if the pager of the store
    does not respond, because threads may be waiting for its pages."""
    record = folder.load(records.RECORD, Deferred)
    if record is not None and await in_thread(client.status, folder) is None:
        return None  # all pages have just been reloaded
    return record


def _remove_orphans(folder: Folder, record: Deferred | None) -> None:
    """Remove the images of a reclaim that was killed before it evicted any page. Without a store, remove its bitmap
    too."""
    if record is None:
        (folder.path / records.FLAGS).unlink(missing_ok=True)
    needed = {own.path for own in record.own} if record is not None else set()
    created = re.compile(rf"{re.escape(folder.name)}\.cold-[0-9a-f]{{8}}\.img")
    for path in folder.path.iterdir():
        if created.fullmatch(path.name) and str(path) not in needed:
            path.unlink()
