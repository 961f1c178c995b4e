"""Device state of a guest whose memory QEMU would send: QEMU saves the devices, and pageferry completes the stream.

QEMU 8.1 and later omit memory from their migration only if its file has a path. A memfd has none, so `device_state` and
`snapshot` would save all memory in it. For such a guest, QMP `xen-save-devices-state` saves the devices while the guest
is stopped. pageferry adds what this stream lacks, in the format of QEMU's migration (docs/devel/migration of QEMU):

- the header and the list of memory blocks: the beginning of a migration that is cancelled before it sends a page;
- ROMs and video memory: read from the memory of the process, at the addresses that HMP `info ramblock` prints.

Unlike QEMU's migration, this method changes neither the run state nor the locks of the disks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.qmp import Command, Monitor
from pageferry.memory.regions import SMALL_PAGE
from pageferry.workloads.qemu import device_state

_SECTION_START = re.compile(rb"\x01(.{4})\x03ram\0{7}\x04", re.DOTALL)
"""Start of the section of memory: type, number, name, instance 0, version 4."""
_MEM_SIZE, _ZERO, _PAGE, _EOS = 0x04, 0x02, 0x08, 0x10
"""Flags of the records of memory (migration/ram.c), in the low bits of a 64-bit offset."""
_FLAGS = SMALL_PAGE - 1
_START, _END, _FOOTER, _DESCRIPTION = b"\x01", b"\x03", b"\x7e", b"\x06"
"""Types of sections (migration/savevm.h)."""
_MAGIC = b"QEVM\0\0\0\x03"
_CONFIGURATION = b"\x07"
_SLOW = 1000
"""Bandwidth limit of the migration that is cancelled, bytes per second."""
_BEGINNING = 1 << 20
"""Maximum length of the beginning of a stream, bytes."""
_SUPPORTED = "use a supported version of QEMU (see `pageferry check`)"
"""Remedy for a stream in a format that pageferry does not support."""

_TIMEOUT = 10.0

_BLOCK = re.compile(r"^ *(\S+) +\S+ \S+ +0x\w+ 0x(\w+) 0x\w+ 0x(\w+) ", re.MULTILINE)
"""Line of `info ramblock`: name, page size, offset, used length, total length, address in QEMU (since 8.1)."""
_NO_PAGE = bytes(SMALL_PAGE)


class Block(NamedTuple):
    """Block of memory in QEMU's migration."""

    name: str
    length: int
    """Used length, bytes."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Beginning of a migration stream of a guest."""

    data: bytes
    """Header, and the section that lists the blocks of memory."""
    section: bytes
    """Number of the section of memory."""
    blocks: tuple[Block, ...]


async def can_save(monitor: Monitor) -> bool:
    """Return whether this QEMU prints the addresses of its memory. Earlier versions omit all shared memory from their
    migration."""
    return bool(await _addresses(monitor))


async def begin(monitor: Monitor) -> Beginning:
    """Return the beginning of the stream of a guest to which the settings of `device_state.plan` were applied. The
    guest keeps its run state. Raises WorkloadError with QEMU's message, WorkloadDied if QEMU exits."""
    before = (await monitor.execute("query-migrate-parameters"))["max-bandwidth"]
    await monitor.execute("migrate-set-parameters", max_bandwidth=_SLOW)
    try:
        with await device_state.channel(monitor) as ours:
            await monitor.execute("migrate", uri=f"fd:{device_state.DESCRIPTOR}")
            try:
                async with asyncio.timeout(_TIMEOUT):
                    return await _read(ours)
            except TimeoutError as late:
                raise WorkloadError(
                    f"cannot save the device state: QEMU has not begun to send it within {_TIMEOUT:g} s; retry"
                ) from late
            finally:
                await monitor.execute("migrate_cancel")
                ours.close()
                await asyncio.shield(device_state.cancelled(monitor))
    finally:
        await monitor.execute("migrate-set-parameters", max_bandwidth=before)


async def save(monitor: Monitor, pid: int, beginning: Beginning, managed: Collection[str]) -> bytes:
    """Return the migration stream of a stopped guest, without the memory blocks in `managed`.

    Raises WorkloadError if the blocks have changed since `begin`, or with QEMU's message. Raises WorkloadDied if QEMU
    exits.
    """
    found = await _addresses(monitor)
    pages = bytearray()
    with _memory_of(pid) as memory:
        for block in beginning.blocks:
            if block.name in managed or block.name.removeprefix("/objects/") in managed:
                continue
            address, length = found.get(block.name, (0, 0))
            if length != block.length:
                raise WorkloadError(f"cannot save the device state: memory block {block.name} was resized; retry")
            pages += b"".join(_records(block.name, os.pread(memory, length, address)))
    ending = _END + beginning.section + pages + _number(_EOS) + _FOOTER + beginning.section
    devices = await _devices(monitor)
    return beginning.data + ending + devices + _DESCRIPTION + (2).to_bytes(4, "big") + b"{}"


class SavedDevices:
    """Output of `xen-save-devices-state`, in a memory file that QEMU opens through a descriptor set."""

    def __init__(self) -> None:
        self.fdset = secrets.randbelow(1 << 30)

    @property
    def removal(self) -> list[Command]:
        """Commands that remove the descriptor from QEMU."""
        return [{"execute": "remove-fd", "arguments": {"fdset-id": self.fdset}}]


async def _devices(monitor: Monitor) -> bytes:
    """Return the sections of the devices of a stopped guest, and the end of the stream."""
    saved, file = SavedDevices(), os.memfd_create("pageferry-state", os.MFD_CLOEXEC)
    try:
        # QEMU selects a descriptor of the set that was opened for writing only.
        writing = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            await monitor.add_descriptor(saved.fdset, writing)
        finally:
            os.close(writing)
        try:
            await monitor.execute("xen-save-devices-state", filename=f"/dev/fdset/{saved.fdset}", live=False)
        finally:
            for command in saved.removal:
                with contextlib.suppress(WorkloadError):
                    await monitor.run(command)
        data = os.pread(file, device_state.MAX_STATE, 0)
    finally:
        os.close(file)
    if not data.startswith(_MAGIC) or data[len(_MAGIC) :][:1] == _CONFIGURATION:
        raise WorkloadError(f"cannot save the device state: QEMU has written it in an unknown format; {_SUPPORTED}")
    return data[len(_MAGIC) :]


async def _read(ours: socket.socket) -> Beginning:
    """Read the stream until the blocks are listed."""
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < _BEGINNING:
        chunk = await loop.sock_recv(ours, 1 << 16)
        if not chunk:
            raise WorkloadError(
                "cannot save the device state: QEMU's migration stream ended before the list of memory blocks; retry"
            )
        data += chunk
        if (parsed := _parse(data)) is not None:
            return parsed
    raise WorkloadError(
        f"cannot save the device state: QEMU's migration stream does not begin with its memory; {_SUPPORTED}"
    )


def _parse(data: bytes) -> Beginning | None:
    """Return the beginning of a stream; None if it is incomplete."""
    if (start := _SECTION_START.search(data)) is None or len(data) < start.end() + 8:
        return None
    record = int.from_bytes(data[start.end() : start.end() + 8], "big")
    if record & _FLAGS != _MEM_SIZE:
        raise WorkloadError(
            f"cannot save the device state: QEMU's migration stream does not list memory blocks; {_SUPPORTED}"
        )
    total, place, blocks = record & ~_FLAGS, start.end() + 8, []
    while total > 0:
        end = place + 1 + (data[place] if place < len(data) else 0)
        if len(data) < end + 16:
            return None
        block = Block(data[place + 1 : end].decode(), int.from_bytes(data[end : end + 8], "big"))
        blocks.append(block)
        total -= block.length
        place = end + 16  # the length, and the address of `x-ignore-shared`
    section = start[1]
    if len(data) < place + 13:
        return None
    if data[place : place + 13] != _number(_EOS) + _FOOTER + section:
        raise WorkloadError(
            "cannot save the device state: QEMU's migration stream has unknown records after the list of memory "
            f"blocks; {_SUPPORTED}"
        )
    return Beginning(data[: place + 13], section, tuple(blocks))


def _records(name: str, contents: bytes) -> Iterator[bytes]:
    """Yield the records of the pages of a block."""
    label = len(name).to_bytes(1, "big") + name.encode()
    for offset in range(0, len(contents), SMALL_PAGE):
        page = contents[offset : offset + SMALL_PAGE]
        if page == _NO_PAGE:
            yield _number(offset | _ZERO) + label + b"\0"
        else:
            yield _number(offset | _PAGE) + label + page


async def _addresses(monitor: Monitor) -> dict[str, tuple[int, int]]:
    """Return the address in QEMU and the used length of each memory block; an empty dictionary if QEMU does not print
    addresses."""
    text = await monitor.execute("human-monitor-command", command_line="info ramblock")
    return {name: (int(address, 16), int(used, 16)) for name, used, address in _BLOCK.findall(text)}


@contextlib.contextmanager
def _memory_of(pid: int) -> Iterator[int]:
    """Open the memory of a process for reading. Raises WorkloadError, WorkloadDied."""
    try:
        descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as gone:
        raise WorkloadDied(f"process {pid} has exited") from gone
    except PermissionError as denied:
        raise WorkloadError(
            f"cannot read the memory of process {pid}: permission denied; run pageferry as its user, or as root"
        ) from denied
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")
