"""Memory use of the workloads of this host, read without sending requests to them.

The sources are cheap to read: `smaps_rollup` of each process (the kernel walks its page tables, which takes
milliseconds if huge pages are mapped), the status of the pagers, and the records of running operations. The dirty rate
is known only during a migration, because no write traces are installed for the overview.
"""

from __future__ import annotations

import time

import msgspec

from pageferry.errors import RestoreError, UnsupportedError, WorkloadDied
from pageferry.events import Event
from pageferry.host import jobs, smaps
from pageferry.host.jobs import Job
from pageferry.host.proc import meminfo
from pageferry.host.registry import AnyEntry, Folder, QemuEntry, Registry
from pageferry.pager import client

_LARGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb")


class HostMemory(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Memory of the host, bytes."""

    total: int
    available: int
    """Memory available to new processes without swapping, bytes."""
    large: int
    """Memory of all processes and files that is backed by huge pages, bytes; without hugetlbfs."""
    swap: int
    swap_free: int


class WorkloadMemory(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Memory use of one workload at one point in time."""

    name: str
    kind: str
    pid: int
    memory: int | None
    """Resident memory of the process, including hugetlbfs, bytes; None if the process cannot be inspected."""
    large: int | None
    """Part of `memory` that is backed by huge pages, bytes; None if the process cannot be inspected."""
    deferred: int
    """Contents not loaded yet, from an image or another host, bytes."""
    waiting: str | None
    """Reason why deferred contents cannot be loaded; None if they can."""
    dirty_rate: int | None
    """Memory modified per second, bytes, as measured by a running migration in its last round; None without one."""
    jobs: list[Job]


class Overview(Event, frozen=True, kw_only=True, tag="top"):
    """Memory use of the host and of every registered workload at one point in time."""

    time: float
    """Time of the measurement, seconds since 1970."""
    host: HostMemory
    workloads: list[WorkloadMemory]


def overview(registry: Registry | None = None) -> Overview:
    """Return the memory use of all workloads. Blocks for milliseconds per workload: do not call from the event loop."""
    registry = registry or Registry()
    looks = (_look(registry, name, entry) for name, entry in registry.entries().items())
    return Overview(time=time.time(), host=_host(), workloads=[found for found in looks if found is not None])


def _host() -> HostMemory:
    counts = meminfo()
    return HostMemory(
        total=counts["MemTotal"],
        available=counts["MemAvailable"],
        large=sum(counts.get(name, 0) for name in ("AnonHugePages", "ShmemHugePages", "FileHugePages")),
        swap=counts.get("SwapTotal", 0),
        swap_free=counts.get("SwapFree", 0),
    )


def _look(registry: Registry, name: str, entry: AnyEntry) -> WorkloadMemory | None:
    memory, large = None, None
    try:
        if entry.alive:  # the pid of an exited process may have been reused
            counts = smaps.rollup(entry.pid)
            memory = counts["Rss"] + counts.get("Shared_Hugetlb", 0) + counts.get("Private_Hugetlb", 0)
            large = sum(counts.get(kind, 0) for kind in _LARGE)
    except WorkloadDied:
        return None
    except UnsupportedError:
        pass
    folder = Folder(registry, name)
    left, waiting = 0, None
    try:
        if (status := client.status(folder)) is not None:
            left, waiting = status.deferred, status.waiting
    except RestoreError as error:
        waiting = str(error)
    running = jobs.running(folder.path)
    return WorkloadMemory(
        name=name,
        kind="qemu" if isinstance(entry, QemuEntry) else "arena",
        pid=entry.pid,
        memory=memory,
        large=large,
        deferred=left,
        waiting=waiting,
        dirty_rate=next((job.dirty_rate for job in running if job.dirty_rate is not None), None),
        jobs=running,
    )
