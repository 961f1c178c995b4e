"""Release of a paused guest's disks for another QEMU, and their locking, while no vCPU runs.

QEMU calls a disk *active* while QEMU may write to the image and holds the locks of its file. `cont` activates the disks
of a guest before it runs. For a guest that stays paused, QEMU 10.0 and later have `blockdev-set-active`. Older versions
activate a disk when it is exported by an NBD server. pageferry unlinks the socket of this server first, so that no
client can connect. To release all disks of a stopped guest, older versions need `xen-save-devices-state`, whose output
is discarded.
"""

from __future__ import annotations

import secrets
import socket
import tempfile

from pageferry.host.qmp import Command, Monitor
from pageferry.workloads.qemu import nbd_server

_SET_ACTIVE = "blockdev-set-active"
LOCK: Command = {"execute": _SET_ACTIVE, "arguments": {"active": True}}
"""Command that locks all disks, for the cleanup plan of a guest. QEMU before 10.0 does not support it."""


async def lock(monitor: Monitor) -> None:
    """Activate all disks of a paused guest, which stays paused.

    Raises WorkloadError with QEMU's message, for example if another process has locked a disk. Raises WorkloadDied if
    QEMU has exited.
    """
    if await monitor.supports(_SET_ACTIVE):
        await monitor.run(LOCK)
    else:
        await _export(monitor)


async def release(monitor: Monitor) -> None:
    """Deactivate all disks of a paused guest, so that another QEMU can lock them.

    Raises WorkloadError with QEMU's message, WorkloadDied if QEMU has exited.
    """
    if await monitor.supports(_SET_ACTIVE):
        await monitor.execute(_SET_ACTIVE, active=False)
    else:
        await _export(monitor)  # these QEMU versions abort if a released disk is released again
        await monitor.execute("xen-save-devices-state", filename="/dev/null", live=True)


async def _export(monitor: Monitor) -> None:
    nodes = [disk["inserted"]["node-name"] for disk in await monitor.execute("query-block") if "inserted" in disk]
    if not nodes:
        return
    ours = await _start_server(monitor)
    try:
        for node in nodes:
            await _export_node(monitor, node)
    finally:
        if ours:
            await nbd_server.stop(monitor)


async def _export_node(monitor: Monitor, node: str) -> None:
    name = f"pageferry-{secrets.token_hex(4)}"
    await monitor.execute("block-export-add", type="nbd", id=name, name=name, node_name=node)
    await monitor.execute("block-export-del", id=name, mode="hard")


async def _start_server(monitor: Monitor) -> bool:
    """Start an NBD server that no client can reach. Return False if QEMU already has an NBD server, which is used
    instead."""
    with socket.socket(socket.AF_UNIX) as listening, tempfile.TemporaryDirectory(prefix="pageferry-") as private:
        listening.bind(f"{private}/nbd.sock")
        listening.listen(1)
        return await nbd_server.start(monitor, listening)
