"""Announcement of the network addresses of a guest (QMP `announce-self`).

Switches and bridges send packets for a MAC address to the port on which they last received a packet from it. QEMU
therefore sends a RARP packet for each network device several times, and a virtio-net device also has the guest announce
its IP addresses. QEMU does the same when it loads a device state. Those packets wait until the guest runs, and can then
all be sent within one millisecond.
"""

from __future__ import annotations

from pageferry.host.qmp import Command, Monitor

COMMAND: Command = {"execute": "announce-self", "arguments": {"initial": 50, "max": 550, "rounds": 5, "step": 100}}
"""Command with QEMU's default parameters: times in milliseconds."""

TIMEOUT = 5.0
"""Maximum time until QEMU has executed the commands, seconds. QEMU does not respond while its main loop waits for a
missing page."""


async def announce(monitor: Monitor) -> None:
    """Announce a guest with its user's parameters (`announce-initial` and others, of QMP `migrate-set-parameters`).

    Raises WorkloadError if this QEMU does not support the command, WorkloadDied if QEMU has exited.
    """
    settings = await monitor.execute("query-migrate-parameters")
    known = {key: settings.get(f"announce-{key}", default) for key, default in COMMAND["arguments"].items()}
    await monitor.run(COMMAND | {"arguments": known})
