"""Exports of the disks of a QEMU guest that waits for its state: QEMU's NBD server writes what the source sends.

A disk is exported by the node that the guest's device uses. QEMU allows this until the guest runs. The server listens
on a socket that only this process can reach, so the connections that `connect` returns are the only ones.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pageferry.errors import WorkloadError
from pageferry.workloads.disk_copies import CopiedDisk
from pageferry.workloads.qemu import disk_cache, nbd_server
from pageferry.workloads.qemu.block_devices import BlockDevice
from pageferry.workloads.qemu.control import QemuControl


def export_name(number: int) -> str:
    """Return the name under which the disk with this number is exported."""
    return f"pageferry-disk-{number}"


def copied_disk(device: BlockDevice) -> CopiedDisk:
    """Return the description of a disk that is copied."""
    return CopiedDisk(device.shown, device.layers[0].path, device.layers[0].size)


class QemuExports:
    """Exports of disks. `devices`: disks to export, by number. `places`: paths at which this process finds their
    files."""

    def __init__(self, name: str, control: QemuControl, devices: dict[int, BlockDevice], places: Sequence[str]) -> None:
        self.numbers = tuple(devices)
        self.disks: Sequence[CopiedDisk] = tuple(map(copied_disk, devices.values()))
        self._name = name
        self._control = control
        self._devices = devices
        self._places = places
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        """Private directory of the socket; None before `open` and after `close`."""

    async def open(self) -> None:
        """Start the NBD server, and export the disks. Raises WorkloadError, WorkloadDied."""
        if not self._devices:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="pageferry-")
        async with self._control.session() as monitor:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(self._path)
                listening.listen(len(self._devices))
                if not await nbd_server.start(monitor, listening, len(self._devices)):
                    raise WorkloadError(
                        f"cannot receive the disks of {self._name}: its QEMU already has an NBD server; stop it (QMP "
                        "nbd-server-stop)"
                    )
            for number, device in self._devices.items():
                name = export_name(number)
                await monitor.execute(
                    "block-export-add", type="nbd", id=name, name=name, node_name=device.node, writable=True
                )

    async def connect(self) -> list[socket.socket]:
        """Return a connection to the NBD server for each disk. Raises WorkloadError."""
        connections: list[socket.socket] = []
        try:
            for _ in self._devices:
                connections.append(socket.socket(socket.AF_UNIX))
                connections[-1].connect(self._path)
        except OSError as error:
            for connection in connections:
                connection.close()
            raise WorkloadError(f"cannot connect to the NBD server of {self._name}: {error}") from error
        return connections

    async def flush(self) -> None:
        """Flush the host's page cache for the disks."""
        if self._places:
            await disk_cache.flush_beside(self._places)

    async def close(self) -> None:
        """Stop the NBD server, which ends the exports. Raises WorkloadError, WorkloadDied."""
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        folder.cleanup()
        async with self._control.session() as monitor:
            await nbd_server.stop(monitor)

    @property
    def _path(self) -> str:
        assert self._folder is not None, "the exports are open"
        return str(Path(self._folder.name, "nbd"))
