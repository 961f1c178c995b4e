"""Device state of a QEMU guest that stays paused, saved by an internal snapshot into a memory file.

QEMU's own migration would release the disks of the guest and set its run state to `postmigrate`, in which QEMU refuses
another migration until the guest has run. `snapshot-save` writes the same stream, and changes neither the disks nor the
run state. It requires a qcow2 file as its destination. This file is a memfd that is passed to QEMU as a descriptor,
attached to no device, and removed at the end. `x-ignore-shared` omits memory in shared files from this stream too.

Layout of qcow2 (numbers big endian): a header, a table of refcount blocks, a refcount block, a two-level table of
clusters. The state is in the clusters after those of the disk, located by the level-1 table of the snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import struct

from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host.qmp import Command, Monitor
from pageferry.workloads.qemu.device_state import MAX_STATE

_COMMAND = "snapshot-save"
_TAG = "state"

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_DISK = 1 << 20
"""Size of the disk, bytes. The disk stays empty."""
_LIMIT = MAX_STATE + (16 << 20)
"""Maximum size of the file, bytes: the largest accepted state and the tables of the file."""
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
"""Header of the file: magic, version, backing file (offset, length), cluster bits, size, encryption, level-1 entries
and offset, refcount table (offset, clusters), snapshots (number, offset), features (incompatible, compatible,
autoclear), refcount order, header length."""
_SNAPSHOT = struct.Struct(">QIHHIIQII")
"""Entry of the snapshot table: level-1 table (offset, entries), lengths of id and name, date, nanoseconds, clock, size
of the state (32 bits), length of the extra data, which begin with the size of the state in 64 bits."""
_OFFSET = 0x00FF_FFFF_FFFF_FE00
"""Bits of a table entry that contain an offset in the file."""


class Snapshot:
    """Internal snapshot of one paused guest. `save` may be called only once."""

    def __init__(self) -> None:
        name = f"pageferry-{secrets.token_hex(4)}"
        self._job, self._node, self._fdset = name, name, secrets.randbelow(1 << 30)

    @property
    def removal(self) -> list[Command]:
        """Commands that remove all objects that `save` creates in QEMU. They may be executed even if `save` was
        interrupted."""
        return [
            {"execute": "job-dismiss", "arguments": {"id": self._job}},
            {"execute": "blockdev-del", "arguments": {"node-name": self._node}},
            {"execute": "remove-fd", "arguments": {"fdset-id": self._fdset}},
        ]

    async def save(self, monitor: Monitor) -> bytes:
        """Return the migration stream of a paused guest, to which the settings of `device_state.plan` were applied. The
        run state and the disks of the guest do not change.

        Raises UnsupportedError if this QEMU has no `snapshot-save`, WorkloadError with QEMU's message, WorkloadDied.
        """
        if not await monitor.supports(_COMMAND):
            raise UnsupportedError(
                f"cannot save the state of a paused guest: this QEMU lacks {_COMMAND}; resume it first"
            )
        file = _new_file()
        try:
            try:
                await self._write(monitor, file)
            finally:
                await asyncio.shield(self._remove(monitor))
            return _state_in(file)
        finally:
            os.ftruncate(file, 0)  # QEMU may keep the removed descriptor open until the guest runs
            os.close(file)

    async def _write(self, monitor: Monitor, file: int) -> None:
        await monitor.add_descriptor(self._fdset, file)
        protocol = {"driver": "file", "filename": f"/dev/fdset/{self._fdset}"}
        await monitor.execute("blockdev-add", driver="qcow2", node_name=self._node, file=protocol)
        with monitor.events("JOB_STATUS_CHANGE") as changes:
            await monitor.execute(_COMMAND, job_id=self._job, tag=_TAG, vmstate=self._node, devices=[self._node])
            change = {"id": "", "status": ""}
            while (change["id"], change["status"]) != (self._job, "concluded"):
                change = await monitor.next_event(changes)
        job = next(job for job in await monitor.execute("query-jobs") if job["id"] == self._job)
        if "error" in job:
            raise WorkloadError(f"QEMU could not save the device state: {job['error']}")

    async def _remove(self, monitor: Monitor) -> None:
        for command in self.removal:
            with contextlib.suppress(WorkloadError):  # objects that `save` has not created do not exist
                await monitor.run(command)


def _new_file() -> int:
    """Create an empty qcow2 file in memory, of at most `_LIMIT` bytes. Return its descriptor."""
    file = os.memfd_create("pageferry-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, _LIMIT)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    table, block, level1 = (number * _CLUSTER for number in (1, 2, 3))
    header = (b"QFI\xfb", 3, 0, 0, _CLUSTER_BITS, _DISK, 0, 1, level1, table, 1, 0, 0, 0, 0, 0, 4, _HEADER.size)
    os.pwrite(file, _HEADER.pack(*header), 0)
    os.pwrite(file, struct.pack(">Q", block), table)
    os.pwrite(file, struct.pack(">4H", 1, 1, 1, 1), block)  # the first four clusters are in use
    return file


def _state_in(file: int) -> bytes:
    """Return the state in the only snapshot of a file. Raises WorkloadError if the file does not contain exactly one,
    or if the state is too large."""
    snapshots, first = _HEADER.unpack(os.pread(file, _HEADER.size, 0))[11:13]
    if snapshots != 1:
        raise WorkloadError(f"QEMU has written {snapshots} snapshots instead of its device state")
    offset, entries, *_, extra = _SNAPSHOT.unpack(os.pread(file, _SNAPSHOT.size, first))
    if extra < 8:
        raise WorkloadError("the snapshot of QEMU does not state the size of the device state")
    (size,) = struct.unpack(">Q", os.pread(file, 8, first + _SNAPSHOT.size))
    if size > MAX_STATE:
        raise WorkloadError(
            f"the device state is larger than {MAX_STATE >> 20} MiB: guest memory is in it, not in a shared file"
        )
    covered = _CLUSTER * _CLUSTER // 8  # bytes covered by one level-2 table
    level1 = struct.unpack(f">{entries}Q", os.pread(file, 8 * entries, offset))
    state = bytearray()
    for entry in level1[-(-_DISK // covered) :]:
        for cluster in struct.unpack(f">{_CLUSTER // 8}Q", os.pread(file, _CLUSTER, entry & _OFFSET)):
            if len(state) < size:
                state += os.pread(file, _CLUSTER, cluster & _OFFSET)
    return bytes(state[:size])
