"""Memory use of the workloads of this host, read without sending requests to them.

The sources are cheap to read: `smaps_rollup` of each process (the kernel walks its page tables, which takes
milliseconds if huge pages are mapped), the status of the pagers, and the records of running operations. The dirty rate
is known only during a migration, because no write traces are installed for the overview.
"""

from __future__ import annotations

import time

from pageferry.errors import RestoreError, UnsupportedError, WorkloadDied
from pageferry.host import jobs, smaps
from pageferry.host.proc import meminfo
from pageferry.host.registry import AnyEntry, Folder, QemuEntry, Registry
from pageferry.pager import client
from pageferry.workloads.events import HostMemory, Overview, WorkloadMemory

_LARGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb")


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
