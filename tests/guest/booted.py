"""Test guests that start from a saved state. A test session boots each kind of guest once.

A boot under TCG takes about 5 s of CPU time, a start from a state 0.3 s. QEMU itself saves and loads the device state
(`-incoming`). Memory is copied from file to file, huge page by huge page, without `pageferry checkpoint` and `pageferry
restore`. The guest therefore has no pager, no userfaultfd registration and no missing page, and the same memory is
allocated as after a boot. QEMU's page tables map only the pages that were accessed since the start. Tests of the boot,
the command line or the QEMU process do not use saved states: they boot their guests.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pageferry import _engine
from pageferry.memory.regions import Region
from pageferry.workloads.qemu.guest import QemuWorkload
from tests.guest.machines import GuestParts
from tests.guest.serial import Serial

MEMORY, STATE = "memory", "state"
_CHUNK = 2 << 20


async def start(name: str, parts: GuestParts, serial: Serial, *options: str, **details: str) -> QemuWorkload:
    """Start a guest, and return the guest when its checker runs. `options`, `details`: see `GuestParts.command`."""
    command = parts.command(serial, *options, **details)
    if parts.states is None:
        workload = await QemuWorkload.start(name, command)
        await serial.ready()
        return workload
    state = await _saved(parts.states, parts, *options, **details)
    workload = await QemuWorkload.start(name, command, incoming=True)
    (region,) = workload.regions
    _load(state / MEMORY, region)
    await workload.load_state((state / STATE).read_bytes())
    await workload.resume()
    await serial.ready()
    assert await workload.running()  # before this reply, the user's migration settings have been restored
    return workload


async def _saved(states: Path, parts: GuestParts, *options: str, **details: str) -> Path:
    """Return the folder with the saved state of a guest with this command line.

    The first process that needs the state boots the guest.
    """
    words = parts.command(Serial(Path("serial")), *options, **details)
    folder = states / hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    with unsaved(folder) as temporary:
        if temporary is not None:
            await _boot(temporary, parts, *options, **details)
    return folder


@contextmanager
def unsaved(folder: Path) -> Iterator[Path | None]:
    """Yield a directory in which to save a state; it becomes `folder` after the block. Yield None if `folder` exists.

    Other processes that need the same state wait until the block ends.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if folder.exists():
            yield None
            return
        temporary = folder.with_suffix(".new")
        temporary.mkdir(exist_ok=True)
        yield temporary
        temporary.rename(folder)


async def _boot(folder: Path, parts: GuestParts, *options: str, **details: str) -> None:
    """Boot a guest, and save its state in a folder."""
    serial = Serial(folder / "serial")
    workload = await QemuWorkload.start(f"boot-{folder.stem}", parts.command(serial, *options, **details))
    try:
        await serial.ready()
        await serial.ticks(1)
        await workload.pause()
        (folder / STATE).write_bytes(await workload.save_state())
        (region,) = workload.regions
        _save(region, folder / MEMORY)
    finally:
        await workload.discard()


def _save(region: Region, path: Path) -> None:
    """Copy the memory of a region to a file. Holes remain holes."""
    with path.open("wb") as file:
        file.truncate(region.length)
        for at, length in _allocated(region.fd, region.file_offset, region.length):
            os.pwrite(file.fileno(), os.pread(region.fd, length, region.file_offset + at), at)


def _load(path: Path, region: Region) -> None:
    """Copy a file to the memory of a region, through a mapping because write(2) allocates no huge pages."""
    view = memoryview(_engine.Mapping(region.fd, region.length, region.file_offset))
    with path.open("rb") as file:
        for at, length in _allocated(file.fileno(), 0, region.length):
            view[at : at + length] = os.pread(file.fileno(), length, at)


def _allocated(descriptor: int, start: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield offset (from `start`) and length of each part of a file that is not a hole.

    A part is at most one huge page.
    """
    at = 0
    while at < length:
        try:
            at = os.lseek(descriptor, start + at, os.SEEK_DATA) - start
        except OSError:
            return
        end = min(os.lseek(descriptor, start + at, os.SEEK_HOLE) - start, length)
        while at < end:
            part = min(_CHUNK - at % _CHUNK, end - at)
            yield at, part
            at += part


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file during the block. The file is created."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
