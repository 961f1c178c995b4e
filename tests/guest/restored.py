"""Guests restored from images."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pageferry
from pageferry.checkpoints.events import RestoreResult
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.host import proc, processes
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Folder, Registry
from pageferry.pager import client, records
from pageferry.pager.protocol import PagerStatus
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest import booted
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial

OPTIONS = ("-smp", "2", "-device", "virtio-balloon-pci,id=balloon")
BUSY = "ferry.mib=64 ferry.rate=3000"


@contextlib.asynccontextmanager
async def restored(name: str, image: Path, command: Sequence[str], **options: Any) -> AsyncIterator[QemuWorkload]:
    """Yield a guest that is restored for the block."""
    workload, _ = await restore_guest(name, image, command, **options)
    try:
        yield workload
    finally:
        await workload.discard()


def image_of_a_guest(parts: GuestParts, folder: Path, *, paused: bool = False) -> Path:
    """Checkpoint a guest. If `paused` is true, pause the guest first, as a user would. Return the path of the image."""

    async def make() -> Path:
        serial = Serial(folder / "serial")
        source = await booted.start("source", parts, serial, *OPTIONS, checker=BUSY)
        await serial.ticks(2)
        if paused:
            async with await Monitor.open(source.qmp_socket) as monitor:
                await monitor.execute("stop")
        await pageferry.checkpoint_async(source, folder / "image")
        await source.discard()
        return folder / "image"

    return asyncio.run(make())


class Restored:
    """Guest restored from an image."""

    def __init__(self, name: str, parts: GuestParts, serial: Serial) -> None:
        self.folder = Folder(Registry(), name)
        self.command = parts.command(serial, *OPTIONS)
        self.serial = serial
        self.pager: tuple[int, int] | None = None
        """Pid and start time of the pager; None until `status` has found a pager."""

    async def start(
        self, image: Path, *, prefetch: bool = True, eager: bool = False, paused: bool = False
    ) -> RestoreResult:
        """Restore the guest from an image. Return the result."""
        started = await restore_guest(
            self.folder.name, image, self.command, prefetch=prefetch, eager=eager, paused=paused
        )
        self.workload, result = started
        await self.status()
        return result

    async def run(self) -> None:
        """Resume the guest with QMP's `cont`, as its user would."""
        async with await Monitor.open(self.workload.qmp_socket) as monitor:
            await monitor.execute("cont")

    async def end(self) -> None:
        """Terminate the guest, and wait until its pager has exited."""
        await self.status()
        await self.workload.discard()
        if self.pager is not None:
            await processes.wait_for_end(*self.pager)

    async def status(self) -> PagerStatus | None:
        """Return the status of the pager, or None without a pager. Record the pid and start time of the pager."""
        status = await asyncio.to_thread(client.status, self.folder)
        if status is not None and (started := proc.start_time(status.pager)) is not None:
            self.pager = (status.pager, started)
        return status

    async def arrived(self) -> None:
        """Wait until all memory of the guest is loaded."""
        async with asyncio.timeout(30):
            while await self.status() is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def logged(self, text: str) -> None:
        """Wait until the log of the pager contains `text`, for at most 60 seconds."""
        async with asyncio.timeout(60):
            while text not in (self.folder.path / records.LOG).read_text():  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def idle(self) -> PagerStatus:
        """Wait until the pager of a paused guest has loaded no page for a second. Return its status."""
        before = None
        async with asyncio.timeout(60):
            while True:
                status = await self.status()
                assert status is not None
                if before is not None and (status.loaded, status.bytes_read) == (before.loaded, before.bytes_read):
                    return status
                before = status
                await asyncio.sleep(1)

    async def kill_pager(self) -> None:
        """Kill the pager with SIGKILL, and wait until it has exited."""
        status = await self.status()
        assert status is not None
        started = proc.start_time(status.pager)
        assert started is not None
        os.kill(status.pager, signal.SIGKILL)
        await processes.wait_for_end(status.pager, started)
