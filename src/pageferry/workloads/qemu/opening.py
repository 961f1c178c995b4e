"""Opening of registered QEMU guests by their name."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pageferry.errors import NoSuchWorkload, WorkloadError
from pageferry.host import qmp_peer
from pageferry.host.blocking import in_thread
from pageferry.host.qmp import Monitor
from pageferry.host.registry import CLONE_FILE, Folder, QemuEntry, Registry
from pageferry.memory.regions import Region
from pageferry.workloads.qemu import ram, run_state
from pageferry.workloads.qemu.machine import Machine
from pageferry.workloads.qemu.process import QemuProcess

if TYPE_CHECKING:
    from pageferry.pager.base_records import CloneRecord


@dataclass(frozen=True, slots=True)
class Opened:
    """Opened guest, with its process, machine and memory."""

    folder: Folder
    entry: QemuEntry
    machine: Machine
    regions: tuple[Region, ...]
    ran: bool
    """Whether the guest was running when it was opened."""
    child: QemuProcess | None = None
    """Process of QEMU if this process has started it; None otherwise."""
    clone: CloneRecord | None = None
    """Record of a guest that shares the memory of its image, and has no regions; None for any other guest."""


async def find(name: str, registry: Registry, timeout: float) -> Opened:
    """Open the registered guest with this name. Raises NoSuchWorkload, WorkloadError, WorkloadDied."""
    async with session(name, registry, timeout) as (folder, entry, monitor):
        machine = await Machine.ask(monitor)
        ran = await run_state.runs(monitor)
        clone = _clone_record(folder)
        regions = await regions_of(monitor, entry.pid) if clone is None else ()
    return Opened(folder, entry, machine, regions, ran, clone=clone)


def _clone_record(folder: Folder) -> CloneRecord | None:
    """Return the record of a clone; None for any other guest, for which no further module is imported."""
    if not (folder.path / CLONE_FILE).exists():
        return None
    from pageferry.pager.base_records import clone_record

    return clone_record(folder)


@contextlib.asynccontextmanager
async def session(name: str, registry: Registry, timeout: float) -> AsyncIterator[tuple[Folder, QemuEntry, Monitor]]:
    """Open a session of the monitor of the registered guest with this name, for the block.

    Raises NoSuchWorkload, WorkloadDied, and WorkloadError if another client has the monitor for `timeout` seconds, or
    another process serves its socket.
    """
    folder = registry.folder(name)
    entry = registry.lookup(name)
    if not isinstance(entry, QemuEntry):
        raise NoSuchWorkload(f"{name} is not a QEMU guest, or is still being started; see `pageferry list`")
    async with await Monitor.open(entry.qmp_socket, timeout=timeout) as monitor:
        if (pid := await pid_of(monitor)) != entry.pid:
            raise WorkloadError(
                f"cannot attach to {name}: {entry.qmp_socket} is served by process {pid}, and the guest is "
                f"process {entry.pid}; end the process that has taken the socket"
            )
        yield folder, entry, monitor


async def pid_of(monitor: Monitor) -> int:
    """Return the process id of the QEMU that serves a monitor."""
    threads = [cpu["thread-id"] for cpu in await monitor.execute("query-cpus-fast")]
    return await in_thread(qmp_peer.find_process, monitor.peer, threads, monitor.path)


async def regions_of(monitor: Monitor, pid: int) -> tuple[Region, ...]:
    """Open the memory of a guest. Raises WorkloadError, UnsupportedError."""
    try:
        return await ram.open_regions(monitor, pid)
    except PermissionError as denied:
        raise WorkloadError(
            f"cannot open the memory of process {pid}: {denied.strerror}; run pageferry as the user of that QEMU, "
            "or as root"
        ) from denied
