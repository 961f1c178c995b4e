"""NBD server of a QEMU: it listens on a socket that is passed to QEMU, so that no other process can connect."""

from __future__ import annotations

import socket

from pageferry.errors import WorkloadError
from pageferry.host.qmp import Monitor

_DESCRIPTOR = "pageferry-nbd"


async def start(monitor: Monitor, listening: socket.socket, connections: int = 0) -> bool:
    """Start an NBD server on a listening socket. Return False if QEMU already has an NBD server.

    `connections`: maximum number of clients; 0 for any number. Raises WorkloadError, WorkloadDied.
    """
    await monitor.give_descriptor(_DESCRIPTOR, listening.fileno())
    try:
        await monitor.execute(
            "nbd-server-start", addr={"type": "fd", "data": {"str": _DESCRIPTOR}}, max_connections=connections
        )
    except WorkloadError as failed:
        if "already" not in str(failed):
            raise
        await monitor.execute("closefd", fdname=_DESCRIPTOR)
        return False
    return True


async def stop(monitor: Monitor) -> None:
    """Stop the NBD server, and end all of its exports."""
    await monitor.execute("nbd-server-stop")
