"""Mode `copy` of a checkpoint with disks: a copy of all disks as of the snapshot point; the guest keeps its files (S4).

A disk whose file can share its blocks with a copy (FICLONE of ioctl_ficlone(2): XFS, Btrfs) is copied in this way in
the pause. For all others, an empty qcow2 file is created and opened before the pause. In the pause, one QMP transaction
starts a `blockdev-backup` for each of them. Before the guest overwrites a block, QEMU copies the old contents. The
copies are complete when the jobs are.

With a bandwidth limit, the jobs copy only blocks that the guest overwrites, until the memory has been saved under the
same limit. Then, the jobs share the limit equally.

While a job runs, QEMU cannot deactivate the disks, so its migration of the device state would fail. The state is saved
by a snapshot without memory instead, as for a paused guest (`snapshot`).

If a copy runs out of space while the guest overwrites a block, QEMU 10.1 and newer fail the job. Older versions fail
the request of the guest, and usually pause the guest. For these versions, the space is checked before the pause, and a
guest that is paused nevertheless runs again when its jobs have been cancelled.

If the command fails or is killed, the jobs are cancelled and the copies removed; by a guardian if the command is
killed. The guest is not affected.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from pageferry.errors import WorkloadError
from pageferry.host import files
from pageferry.host.blocking import in_thread, to_the_end
from pageferry.host.fault_points import fault_point
from pageferry.host.guardian import RemoveFiles
from pageferry.workloads.protocols import SavedDisk
from pageferry.workloads.qemu import block_jobs, disk_files, frozen_files, qcow2
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord, Layer
from pageferry.workloads.qemu.block_jobs import Job, Progress
from pageferry.workloads.qemu.disk_saving import (
    DiskSaving,
    ImageOfGuest,
    SavingGuest,
    as_before,
    deletion,
    opening,
    stem_of,
)
from pageferry.workloads.qemu.frozen_files import Need

_FICLONE = 0x40049409
"""Request of ioctl_ficlone(2)."""
_SLOW = 1 << 16
"""Speed limit of jobs in the pause, bytes per second."""
_IDLE = 1
"""Speed limit of jobs that copy only what the guest overwrites. For QEMU, 0 means no limit."""


class Copy(NamedTuple):
    """Copy of one disk."""

    disk: BlockDevice
    path: Path
    format: str
    source: str | None
    """Path at which this process finds the file of the disk if the copy shares its blocks; None if QEMU copies it."""
    name: str
    """Name of the block node of the copy, and of its job."""


class DiskCopying(DiskSaving):
    """Mode `copy`. `folder`: directory of the copies. `bandwidth`: limit for all jobs together, bytes per second, 0 for
    none."""

    def __init__(self, guest: SavingGuest, image: ImageOfGuest, folder: Path, bandwidth: int = 0) -> None:
        super().__init__(guest, image)
        self._folder = folder.absolute()
        self._bandwidth = bandwidth
        self._copies: list[Copy] = []
        self._policy: dict[str, str] = {}
        """Arguments of all jobs for errors of the copies."""
        self._sent = self._slow = False
        self._sharing: set[str] = set()
        """Names of the jobs that share the bandwidth limit."""

    @property
    def keeps_disks(self) -> bool:
        """Also true if QEMU copies any disk: its migration could not release a disk that a job reads."""
        return bool(self._jobs) or super().keeps_disks

    @property
    def _jobs(self) -> list[Copy]:
        return [copy for copy in self._copies if copy.source is None]

    async def prepare(self) -> None:
        """Create the copies, and open those that QEMU fills."""
        await super().prepare()
        used: set[Path] = set()
        for number, disk in enumerate(self._disks()):
            copy = await to_the_end(in_thread(self._add, number, disk, used))
            used.add(copy.path)
            self._watch_copies()
            if copy.source is None:
                await self._run(opening(copy.name, copy.path, copy.disk, {}))
        if self._jobs:
            await self._prepare_for_full()
        fault_point("disks.prepared")

    async def _prepare_for_full(self) -> None:
        """Ensure that a lack of space fails the jobs, and not the requests of the guest."""
        async with self.guest.control.session() as monitor:
            if await block_jobs.has_option(monitor, "blockdev-backup", "on-cbw-error"):
                self._policy = {"on-cbw-error": "break-snapshot"}
                return
        free = await in_thread(os.statvfs, self._folder)
        space = free.f_bavail * free.f_frsize
        for copy in self._jobs:
            needed = await in_thread(self.guest.storage.allocated, copy.disk)
            if needed > space:
                cause = f"No space left on device: {needed / 2**20:.1f} MiB may be needed, {space / 2**20:.1f} are free"
                raise self._cannot_copy(copy.disk, copy.path, cause)
            space -= needed

    def _add(self, number: int, disk: BlockDevice, used: set[Path]) -> Copy:
        copy = self._create(number, disk, used)
        self._copies.append(copy)  # in this thread, so that the copy is removed if the command is interrupted now
        return copy

    def _create(self, number: int, disk: BlockDevice, used: set[Path]) -> Copy:
        """Create the file of a copy, which shares the blocks of the disk if that is possible."""
        stem = f"{stem_of(Path(disk.layers[0].path))}-{self.image.short_id}"
        if any(one.name.startswith(f"{stem}.") for one in used):
            stem = f"{stem}-{number}"
        name, source = f"pageferry-{self.image.short_id}-{number}", self._shareable(disk)
        if source is not None:
            kind = disk.layers[0].format
            path = self._folder / f"{stem}.{kind}"
            descriptor = self._new_file(path, f"the copy of disk {disk.shown}")
            try:
                if _share(source, descriptor):
                    return Copy(disk, path, kind, source, name)
            finally:
                os.close(descriptor)
            path.unlink()
        return self._create_qcow2(disk, self._folder / f"{stem}.qcow2", name)

    def _create_qcow2(self, disk: BlockDevice, path: Path, name: str) -> Copy:
        descriptor = self._new_file(path, f"the copy of disk {disk.shown}")
        try:
            qcow2.write_empty(descriptor, disk.layers[0].size)
        except OSError as error:
            path.unlink()
            raise self._cannot_copy(disk, path, error.strerror) from error
        finally:
            os.close(descriptor)
        return Copy(disk, path, "qcow2", None, name)

    def _shareable(self, disk: BlockDevice) -> str | None:
        """Return the path of a disk's file if that file alone contains the whole disk; None otherwise."""
        top = disk.layers[0]
        alone = len(disk.layers) == 1 and not top.offset and top.driver == "file"
        if not alone or top.file is None or top.file.kind != "file" or top.format not in ("raw", "qcow2"):
            return None
        return next(iter(self.guest.storage.places((disk,))), None)

    async def freeze(self) -> None:
        """Share the blocks of disks, and start all jobs in one transaction."""
        for copy in self._copies:
            if copy.source is not None and not _share_again(copy.source, copy.path):
                raise self._cannot_copy(copy.disk, copy.path, "the file system cannot share its blocks")
        if self._jobs:
            actions = [
                {
                    "type": "blockdev-backup",
                    "data": {
                        "job-id": copy.name,
                        "device": copy.disk.node,
                        "target": copy.name,
                        "sync": "full",
                        "speed": _IDLE if self._bandwidth else _SLOW,
                        **self._policy,
                        **block_jobs.KEPT,
                    },
                }
                for copy in self._jobs
            ]
            self._sent = self._slow = True
            await self._run({"execute": "transaction", "arguments": {"actions": actions}})
        fault_point("disks.frozen")

    async def resumed(self) -> None:
        """Remove the speed limit that kept the jobs from prolonging the pause. If there is a bandwidth limit, only the
        memory uses it until `complete`."""
        if self._slow and not self._bandwidth:
            self._slow = False
            await self._set_speed({copy.name for copy in self._jobs}, 0)

    async def _share_bandwidth(self, jobs: Mapping[str, Job]) -> None:
        """Divide the bandwidth limit among the jobs that copy, whenever their number has changed."""
        copying = {name for name, job in jobs.items() if job.status == "running"}
        if self._bandwidth and copying and copying != self._sharing:
            self._sharing = copying
            await self._set_speed(copying, max(self._bandwidth // len(copying), 1))

    async def _set_speed(self, names: Iterable[str], speed: int) -> None:
        limits = ({"device": name, "speed": speed} for name in names)
        await self._try(*({"execute": "block-job-set-speed", "arguments": one} for one in limits))

    def before(self, devices: tuple[BlockDevice, ...]) -> tuple[BlockDevice, ...]:
        """Return the devices without the filters that the jobs have put on top of the disks."""
        disks = {copy.disk.id: copy.disk for copy in self._jobs}
        return tuple(as_before(one, disks[one.id]) if one.id in disks else one for one in devices)

    @property
    def is_complete_record(self) -> bool:
        """True: the image refers to all disks."""
        return True

    async def complete(self, record: DiskRecord | None, progress: Progress) -> DiskRecord | None:
        """Wait for the jobs, make the copies durable and read-only, and return the record of the disks."""
        if record is None or not self._copies:
            return record
        await self._complete_jobs(progress)
        saved = {copy.disk.id: await to_the_end(in_thread(_seal, copy, self.image.need)) for copy in self._copies}
        self.saved = tuple(SavedDisk(id=one.disk.id, name=one.disk.shown, path=str(one.path)) for one in self._copies)
        self._unwatch()  # the published image needs the copies, so the guardian must no longer remove them
        fault_point("disks.sealed")
        devices = (replace(one, saved=(saved[one.id],)) if one.id in saved else one for one in record.devices)
        return replace(record, devices=tuple(devices))

    async def _complete_jobs(self, progress: Progress) -> None:
        if not self._jobs:
            return
        names = {copy.name: copy for copy in self._jobs}
        jobs = await block_jobs.reach(
            self.guest.control, list(names), "concluded", progress, each=self._share_bandwidth
        )
        for name, job in jobs.items():
            if job.error is not None:
                raise self._cannot_copy(names[name].disk, names[name].path, job.error)
        await block_jobs.dismiss(self.guest.control, list(names))
        await self._run(*map(deletion, names))

    async def _undo(self) -> None:
        """Cancel the jobs, and close and remove the copies."""
        names = [copy.name for copy in self._jobs]
        with self._logged():
            # QEMU may have started the jobs even if the command was interrupted before the reply.
            await self._end_jobs(names)
        for copy in self._copies:
            with self._logged():
                await in_thread(_remove, copy.path, self.image.need)

    async def _end_jobs(self, names: list[str]) -> None:
        try:
            if names:
                await block_jobs.cancel(self.guest.control, names)
                await block_jobs.dismiss(self.guest.control, names)
                await self._try(*map(deletion, names))
                await self._run_again()
        except WorkloadError:
            self._unwatch(undo=True)
            raise

    async def _run_again(self) -> None:
        """Resume a guest that an error of a copy has paused."""
        if self._sent and not self.guest.control.stays_paused:
            async with self.guest.control.session() as monitor:
                if (await monitor.execute("query-status"))["status"] == "io-error":
                    await monitor.execute("cont")

    def _watch_copies(self) -> None:
        commands = [self._commands([], [copy.name for copy in self._jobs])] if self._jobs else []
        self._watch([RemoveFiles([str(copy.path) for copy in self._copies]), *commands])

    def _cannot_copy(self, disk: BlockDevice, path: Path, cause: str | None) -> WorkloadError:
        return WorkloadError(
            f"cannot copy disk {disk.shown} of {self.guest.name} to {path}: {cause}; free some space, or choose "
            "another directory"
        )


def _share(source: str, target: int) -> bool:
    """Make a file share all blocks of another one. Return False if the file system does not support this."""
    try:
        descriptor = files.open_regular(source)
        try:
            fcntl.ioctl(target, _FICLONE, descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def _share_again(source: str, path: Path) -> bool:
    descriptor = files.open_regular(path, os.O_WRONLY, follow=False)
    try:
        return _share(source, descriptor)
    finally:
        os.close(descriptor)


def _seal(copy: Copy, need: Need) -> Layer:
    """Make a complete copy durable and read-only. Return its description."""
    descriptor = files.open_regular(copy.path, follow=False)
    try:
        os.fsync(descriptor)
        frozen_files.require(copy.path, need)
        frozen_files.seal(copy.path)
        return disk_files.layer_of(descriptor, copy.path, copy.format, copy.disk.layers[0].size)
    finally:
        os.close(descriptor)


def _remove(path: Path, need: Need) -> None:
    frozen_files.release(path, need)
    path.unlink(missing_ok=True)
