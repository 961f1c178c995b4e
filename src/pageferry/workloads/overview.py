"""The workloads of this host at a moment, looked at from outside: nobody is spoken to that could be at work.

What is cheap to read, that is: `smaps_rollup` of each process (the kernel walks its page tables, which takes
milliseconds where large pages are mapped), what pagers say, and the records of verbs at work. Only a migration knows
how fast memory is modified: nothing is traced for this.
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
    """The host's memory, bytes."""

    total: int
    available: int
    """Without swapping."""
    large: int
    """Of all processes and files, on large pages; without hugetlbfs."""
    swap: int
    swap_free: int


class WorkloadMemory(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A workload at a moment, bytes."""

    name: str
    kind: str
    pid: int
    memory: int | None
    """Mapped by its process, hugetlbfs included; None: it may not be looked at."""
    large: int | None
    """Of that, on large pages."""
    deferred: int
    """Contents still to come, from an image or another host."""
    waiting: str | None
    """Why they do not come."""
    dirty_rate: int | None
    """Modified per second, as a migration under way has found in its last round."""
    jobs: list[Job]


class Overview(Event, frozen=True, kw_only=True, tag="top"):
    """Everything at a moment."""

    time: float
    """Seconds since 1970."""
    host: HostMemory
    workloads: list[WorkloadMemory]


def overview(registry: Registry | None = None) -> Overview:
    """Look at all of them. Takes milliseconds for each; call it off the event loop."""
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
        if entry.alive:  # or its pid may be another process's
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
