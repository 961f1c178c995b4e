"""Device state of a QEMU guest that stays paused or keeps its disks, saved by an internal snapshot into a memory file.

QEMU's own migration would release the disks of the guest and set its run state to `postmigrate`, in which QEMU refuses
another migration until the guest has run. `snapshot-save` writes the same stream, and changes neither the disks nor the
run state. It requires a qcow2 file as its destination. This file is a memfd that is passed to QEMU as a descriptor,
attached to no device, and removed at the end. `x-ignore-shared` omits memory in shared files from this stream too.

The state is in the clusters after those of the disk, located by the level-1 table of the snapshot (see `qcow2`).
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
from pageferry.workloads.qemu import qcow2
from pageferry.workloads.qemu.device_state import MAX_STATE
from pageferry.workloads.qemu.qcow2 import CLUSTER, HEADER

_COMMAND = "snapshot-save"
_TAG = "state"

_DISK = 1 << 20
"""Size of the disk, bytes. The disk stays empty."""
_LIMIT = MAX_STATE + (16 << 20)
"""Maximum size of the file, bytes: the largest accepted state and the tables of the file."""
_SNAPSHOT = struct.Struct(">QIHHIIQII")
"""Entry of the snapshot table: level-1 table (offset, entries), lengths of id and name, date, nanoseconds, clock, size
of the state (32 bits), length of the extra data, which begin with the size of the state in 64 bits."""
_OFFSET = 0x00FF_FFFF_FFFF_FE00
"""Bits of a table entry that contain an offset in the file."""


class Snapshot:
    """Internal snapshot of one guest. Its steps are `prepare`, `save` of the paused guest, and the commands of
    `removal`. `save` may be called only once. `close` closes the file of this process."""

    def __init__(self) -> None:
        name = f"pageferry-{secrets.token_hex(4)}"
        self._job, self._node, self._fdset = name, name, secrets.randbelow(1 << 30)
        self._file: int | None = None

    @property
    def removal(self) -> list[Command]:
        """Commands that remove all objects that `prepare` creates in QEMU. They may be executed even if `prepare` was
        interrupted, or not called."""
        return [
            {"execute": "blockdev-del", "arguments": {"node-name": self._node}},
            {"execute": "remove-fd", "arguments": {"fdset-id": self._fdset}},
        ]

    @property
    def dismissal(self) -> Command:
        """Command that removes the job of `save`, if `save` was interrupted."""
        return {"execute": "job-dismiss", "arguments": {"id": self._job}}

    async def prepare(self, monitor: Monitor) -> None:
        """Open the file in QEMU. The guest may run.

        Raises UnsupportedError if this QEMU has no `snapshot-save`, WorkloadError with QEMU's message if QEMU refuses,
        WorkloadDied if QEMU exits.
        """
        if not await monitor.supports(_COMMAND):
            raise UnsupportedError(
                f"cannot save the state of a paused guest: this QEMU lacks {_COMMAND}; resume the guest first"
            )
        self._file = _new_file()
        await monitor.add_descriptor(self._fdset, self._file)
        protocol = {"driver": "file", "filename": f"/dev/fdset/{self._fdset}"}
        await monitor.execute("blockdev-add", driver="qcow2", node_name=self._node, file=protocol)

    async def save(self, monitor: Monitor) -> bytes:
        """Return the migration stream of a paused guest, to which the settings of `device_state.plan` were applied. The
        run state and the disks of the guest do not change.

        Raises WorkloadError with QEMU's message, WorkloadDied if QEMU exits.
        """
        assert self._file is not None, "`prepare` was not called"
        try:
            with monitor.events("JOB_STATUS_CHANGE") as changes:
                arguments = {"job_id": self._job, "tag": _TAG, "vmstate": self._node, "devices": [self._node]}
                await monitor.execute(_COMMAND, **arguments)
                change = {"id": "", "status": ""}
                while (change["id"], change["status"]) != (self._job, "concluded"):
                    change = await monitor.next_event(changes)
            job = next(job for job in await monitor.execute("query-jobs") if job["id"] == self._job)
        finally:
            await asyncio.shield(_try(monitor, self.dismissal))
        if "error" in job:
            raise WorkloadError(f"cannot save the device state: {job['error']}")
        return _state_in(self._file)

    async def remove(self, monitor: Monitor) -> None:
        """Remove all objects that `prepare` creates in QEMU, and free the file."""
        await asyncio.shield(_try(monitor, *self.removal))
        if self._file is not None:
            os.ftruncate(self._file, 0)  # QEMU may keep the removed descriptor open until the guest runs
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


async def _try(monitor: Monitor, *commands: Command) -> None:
    """Execute commands that remove objects, some of which may not exist."""
    for command in commands:
        with contextlib.suppress(WorkloadError):
            await monitor.run(command)


def _new_file() -> int:
    """Create an empty qcow2 file in memory, of at most `_LIMIT` bytes. Return its descriptor."""
    file = os.memfd_create("pageferry-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, _LIMIT)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    qcow2.write_empty(file, _DISK)
    return file


def _state_in(file: int) -> bytes:
    """Return the state in the only snapshot of a file. Raises WorkloadError if the file does not contain exactly one,
    or if the state is too large."""
    snapshots, first = HEADER.unpack(os.pread(file, HEADER.size, 0))[11:13]
    if snapshots != 1:
        raise WorkloadError(f"cannot save the device state: QEMU has written {snapshots} snapshots, expected 1")
    offset, entries, *_, extra = _SNAPSHOT.unpack(os.pread(file, _SNAPSHOT.size, first))
    if extra < 8:
        raise WorkloadError("cannot save the device state: QEMU's snapshot does not contain its size")
    (size,) = struct.unpack(">Q", os.pread(file, 8, first + _SNAPSHOT.size))
    if size > MAX_STATE:
        raise WorkloadError(
            f"cannot save the device state: it is larger than {MAX_STATE >> 20} MiB, so it contains guest memory; put "
            "all guest memory in shared files"
        )
    covered = CLUSTER * CLUSTER // 8  # bytes covered by one level-2 table
    level1 = struct.unpack(f">{entries}Q", os.pread(file, 8 * entries, offset))
    state = bytearray()
    for entry in level1[-(-_DISK // covered) :]:
        for cluster in struct.unpack(f">{CLUSTER // 8}Q", os.pread(file, CLUSTER, entry & _OFFSET)):
            if len(state) < size:
                state += os.pread(file, CLUSTER, cluster & _OFFSET)
    return bytes(state[:size])
