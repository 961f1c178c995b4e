"""Inventory of the workloads of this host, for `pageferry list` and `pageferry top`.

`describe_all` requests the status of every workload. `overview` sends no requests to workloads. It reads `smaps_rollup`
of each process, the status of the pagers, and the records of running operations. For `smaps_rollup`, the kernel walks
the page tables of the process, which takes milliseconds if huge pages are mapped. The dirty rate is known only during a
migration, because no write traces are installed for the overview.
"""

from __future__ import annotations

import asyncio
import os
import time

import msgspec

from pageferry.errors import NoSuchWorkload, RestoreError, UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import endings, jobs, smaps
from pageferry.host.blocking import in_thread
from pageferry.host.proc import meminfo
from pageferry.host.processes import signal_name
from pageferry.host.registry import AnyEntry, Folder, Registry
from pageferry.memory.regions import Region
from pageferry.pager import client
from pageferry.pager.base_records import CloneRecord, clone_record
from pageferry.workloads.events import EndedWorkload, HostMemory, OverlayInfo, Overview, WorkloadInfo, WorkloadMemory
from pageferry.workloads.open import open_workload
from pageferry.workloads.protocols import HasOverlays, Migratable

TIMEOUT = 1.0
"""Seconds to wait for the monitor of a guest, which another command may be using."""

_LARGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb")


async def describe_all(registry: Registry | None = None) -> list[WorkloadInfo]:
    """Return descriptions of all workloads, which are queried concurrently."""
    registry = registry or Registry()
    queries = [_query(registry, name, entry) for name, entry in registry.entries().items()]
    return [info for info in await asyncio.gather(*queries) if info is not None]


def describe_ended(registry: Registry | None = None) -> list[EndedWorkload]:
    """Return descriptions of the workloads that have ended, in the order of their end."""
    registry = registry or Registry()
    return [_ended(registry, record) for record in registry.ended_workloads()]


async def describe(workload: Migratable, clone: CloneRecord | None = None) -> WorkloadInfo:
    """Return the description of an open workload. `clone`: record of a guest that shares the memory of its image.

    Raises WorkloadDied.
    """
    condition = await workload.condition()
    overlays = await workload.overlays() if isinstance(workload, HasOverlays) else []
    if clone is not None:
        memory, resident = clone.length, private_pages(clone)
    else:
        memory, resident = sum(region.length for region in workload.regions), sum(map(_allocated, workload.regions))
    return WorkloadInfo(
        name=workload.name,
        kind=workload.identity.kind,
        pid=workload.pid,
        status=condition.status,
        reason=condition.reason,
        memory=memory,
        resident=resident,
        overlays=[OverlayInfo(*one) for one in overlays],
    )


def overview(registry: Registry | None = None) -> Overview:
    """Return the memory use of all workloads. Blocks for milliseconds per workload: do not call from the event loop."""
    registry = registry or Registry()
    found = (_memory_use(registry, name, entry) for name, entry in registry.entries().items())
    return Overview(time=time.time(), host=_host(), workloads=[one for one in found if one is not None])


async def _query(registry: Registry, name: str, entry: AnyEntry) -> WorkloadInfo | None:
    """Return the description of a registered workload; None if the workload has exited."""
    unasked = WorkloadInfo(name=name, kind=entry.kind, pid=entry.pid, status="unknown")
    if not entry.alive:
        return None if entry.liveness() is False else unasked
    try:
        info = await _described(registry, name)
    except (WorkloadDied, NoSuchWorkload):
        return None
    except WorkloadError:
        info = msgspec.structs.replace(unasked, status="busy")
    deferred, stall_reason = await in_thread(_deferred, registry, name)
    return msgspec.structs.replace(info, deferred=deferred, stall_reason=stall_reason)


async def _described(registry: Registry, name: str) -> WorkloadInfo:
    workload = await open_workload(name, registry=registry, timeout=TIMEOUT)
    try:
        return await describe(workload, clone_record(Folder(registry, name)))
    finally:
        workload.close()


def _allocated(region: Region) -> int:
    return os.fstat(region.fd).st_blocks * 512


def private_pages(clone: CloneRecord) -> int:
    """Return the size of the private pages of a clone, bytes. Raises WorkloadDied."""
    addresses = {segment.address for region in clone.regions for segment in region.segments}
    return sum(one.counts["Anonymous"] for one in smaps.smaps(clone.pid) if one.mapping.address in addresses)


def _deferred(registry: Registry, name: str) -> tuple[int, str | None]:
    """Return the number of deferred bytes, and the reason why they are not loaded."""
    folder = Folder(registry, name)
    if (clone := clone_record(folder)) is not None:
        from pageferry.workloads import bases  # rarely needed

        return bases.deferred_of(folder, clone)
    try:
        status = client.status(folder)
    except RestoreError as error:
        return 0, str(error)
    return (0, None) if status is None else (status.deferred, status.stall_reason)


def _ended(registry: Registry, record: endings.Ended) -> EndedWorkload:
    path, code = endings.log_path(registry.path, record.name), record.code
    lines = endings.tail(path).decode(errors="replace").split("\n")
    return EndedWorkload(
        name=record.name,
        kind=record.kind,
        pid=record.pid,
        cause=record.cause,
        time=record.time,
        exact=record.exact,
        exit_code=code if code is not None and code >= 0 else None,
        signal=signal_name(-code) if code is not None and code < 0 else None,
        log=path.exists(),
        last_line=next((line.strip() for line in reversed(lines) if line.strip()), None),
    )


def _memory_use(registry: Registry, name: str, entry: AnyEntry) -> WorkloadMemory | None:
    """Return the memory use of a registered workload; None if the workload has exited."""
    try:
        # The pid of an exited process may have been reused.
        memory, large = _mapped(entry.pid) if entry.alive else (None, None)
    except WorkloadDied:
        return None
    except UnsupportedError:
        memory, large = None, None
    deferred, stall_reason = _deferred(registry, name)
    running = jobs.running(Folder(registry, name).path)
    return WorkloadMemory(
        name=name,
        kind=entry.kind,
        pid=entry.pid,
        memory=memory,
        large=large,
        deferred=deferred,
        stall_reason=stall_reason,
        dirty_rate=next((job.dirty_rate for job in running if job.dirty_rate is not None), None),
        jobs=running,
    )


def _mapped(pid: int) -> tuple[int, int]:
    """Return the resident memory of a process, and the part that is backed by huge pages, bytes."""
    counts = smaps.rollup(pid)
    memory = counts["Rss"] + counts.get("Shared_Hugetlb", 0) + counts.get("Private_Hugetlb", 0)
    return memory, sum(counts.get(kind, 0) for kind in _LARGE)


def _host() -> HostMemory:
    counts = meminfo()
    return HostMemory(
        total=counts["MemTotal"],
        available=counts["MemAvailable"],
        large=sum(counts.get(name, 0) for name in ("AnonHugePages", "ShmemHugePages", "FileHugePages")),
        swap=counts.get("SwapTotal", 0),
        swap_free=counts.get("SwapFree", 0),
    )
