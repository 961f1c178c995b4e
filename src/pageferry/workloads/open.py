"""Access to registered workloads of all kinds by name. Modules are imported only for the kind that is opened."""

from __future__ import annotations

from pageferry.errors import NoSuchWorkload
from pageferry.host.registry import ArenaEntry, QemuEntry, Registry
from pageferry.workloads.protocols import Migratable


async def open_workload(name: str, *, registry: Registry | None = None, timeout: float | None = None) -> Migratable:
    """Open the workload with this name on this host, for an operation by this process. `timeout`: seconds to wait for
    the monitor of a guest (default: that of `QemuWorkload.attach`).

    Raises NoSuchWorkload, WorkloadDied, WorkloadError if the workload does not reply.
    """
    registry = registry or Registry()
    match registry.lookup(name):
        case QemuEntry():
            from pageferry.host.qmp import TIMEOUT
            from pageferry.workloads.qemu.guest import QemuWorkload

            return await QemuWorkload.attach(name, registry=registry, timeout=timeout or TIMEOUT)
        case ArenaEntry(control_socket=path):
            from pageferry.workloads.arena.control_socket.client import RemoteArena

            return await RemoteArena.connect(path)
        case _:
            raise NoSuchWorkload(f"cannot open {name}: it is still being started; retry when `pageferry list` shows it")
