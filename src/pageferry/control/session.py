"""Sessions of the monitors of guests, for commands of their users."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from pageferry import values
from pageferry.errors import NoSuchWorkload, UnsupportedError
from pageferry.host.qmp import TIMEOUT, Monitor
from pageferry.host.registry import ArenaEntry, Claim, Folder, QemuEntry, Registry
from pageferry.workloads.qemu import opening

_PROCESS = "pid:"


def guest_entry(name: str, purpose: str, registry: Registry) -> QemuEntry:
    """Return the entry of the guest with this name. `purpose`: verb, for error messages.

    Raises UnsupportedError if `name` is not a guest, NoSuchWorkload if there is no workload of this name. Also raises
    WorkloadError and UsageError.
    """
    if values.text("name", name).startswith(_PROCESS):
        raise UnsupportedError(
            f"cannot {purpose} {name}: this verb operates on QEMU guests, and {name} is a process; send it a signal "
            "with kill(1)"
        )
    match registry.lookup(name):
        case QemuEntry() as entry:
            return entry
        case ArenaEntry(pid=pid):
            raise UnsupportedError(
                f"cannot {purpose} {name}: this verb operates on QEMU guests, and {name} is an arena of process {pid}; "
                "use the functions of that program"
            )
        case Claim(pid=pid):
            raise NoSuchWorkload(
                f"cannot {purpose} {name}: process {pid} is still starting it; retry when `pageferry list` shows it"
            )


@contextlib.asynccontextmanager
async def guest_session(
    name: str, purpose: str, *, timeout: float = TIMEOUT, registry: Registry | None = None
) -> AsyncIterator[tuple[Folder, Monitor]]:
    """Open the monitor of a guest for the block, waiting up to `timeout` seconds for other clients.

    Raises the errors of `guest_entry`, WorkloadDied, WorkloadError.
    """
    registry = registry or Registry()
    guest_entry(name, purpose, registry)
    async with opening.session(name, registry, timeout) as (folder, _, monitor):
        yield folder, monitor
