"""Guests that share the memory of an image."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pageferry
from pageferry.checkpoints.events import CheckpointResult, RestoreResult
from pageferry.checkpoints.restore_guest import restore_guest
from pageferry.host import proc, processes, smaps
from pageferry.host.registry import Folder, Registry
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.pager import base_records
from pageferry.pager.base_protocol import BaseStatus
from pageferry.pager.launcher import connect_to_base
from pageferry.workloads.clone_view import PrivateMemory
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.guest.restored import OPTIONS
from tests.guest.serial import Serial
from tests.saved import SLICE


class Clone:
    """Guest that shares the memory of an image."""

    workload: QemuWorkload

    def __init__(self, name: str, parts: GuestParts, serial: Serial) -> None:
        self.folder = Folder(Registry(), name)
        self.command = parts.command(serial, *OPTIONS)
        self.serial = serial

    async def start(self, image: Path, *, prefetch: bool = False) -> RestoreResult:
        """Restore the guest from an image, with shared memory."""
        self.workload, result = await restore_guest(
            self.folder.name, image, self.command, prefetch=prefetch, memory="shared"
        )
        return result

    @property
    def private(self) -> int:
        """Private memory over the base, bytes."""
        record = base_records.clone_record(self.folder)
        assert record is not None
        addresses = {segment.address for region in record.regions for segment in region.segments}
        found = [one for one in smaps.smaps(record.pid) if one.mapping.address in addresses]
        return sum(one.counts["Anonymous"] for one in found)


async def status_of(image: Path) -> BaseStatus:
    """Return the state of the base of an image."""
    pager = connect_to_base(Registry(), image)
    assert pager is not None
    try:
        return await pager.base_status()
    finally:
        pager.close()


async def until_gone(image: Path) -> None:
    """Wait until the base of an image has been removed."""
    async with asyncio.timeout(30):
        while base_records.find_base(Registry(), image) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def kill_pager(image: Path) -> None:
    """Kill the pager of the base of an image with SIGKILL, and wait until it has exited."""
    pid = (await status_of(image)).pager
    started = proc.start_time(pid)
    assert started is not None
    os.kill(pid, signal.SIGKILL)
    await processes.wait_for_end(pid, started)


def contents(workload: QemuWorkload) -> Iterator[bytes]:
    """Yield slices of the memory of a guest that does not run."""
    if workload.clone is None:
        (mapping,) = Memory(workload).mappings
        for start in range(0, len(mapping), SLICE * SMALL_PAGE):
            yield bytes(memoryview(mapping)[start : start + SLICE * SMALL_PAGE])
        return
    memory, (region,) = PrivateMemory(workload.name, workload.clone), workload.clone.regions
    pages = region.length // SMALL_PAGE
    for first in range(0, pages, SLICE):
        yield memory.read(0, first, min(SLICE, pages - first))


async def save(workload: QemuWorkload, path: Path, **options: Any) -> CheckpointResult:
    """Take a checkpoint of a clone, and compare the image with the memory at the snapshot point. Return the result."""
    seen: list[bytes] = []
    save_state = workload.save_state

    async def observed() -> bytes:
        state = await save_state()
        seen[:] = contents(workload)
        return state

    workload.save_state = observed  # type: ignore[method-assign]
    try:
        result = await pageferry.checkpoint_async(workload, path, **options)
    finally:
        del workload.save_state
    saved = ImageFile(path)
    for number, expected in enumerate(seen):
        assert saved.read(number * SLICE, len(expected) // SMALL_PAGE) == expected
    assert len(seen) * SLICE >= saved.pages
    return result
