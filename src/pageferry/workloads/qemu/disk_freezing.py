"""Mode `snapshot` of a checkpoint with disks: an external snapshot of all disks at the snapshot point (S4).

Before the pause, an empty qcow2 overlay is created and opened for each disk that the guest can write to, and recorded
beside the file of the disk (`frozen_files`). In the pause, one QMP transaction of `blockdev-snapshot` makes all
overlays active. From then on QEMU has the files of the disks open for reading only, and they contain the disks as of
the snapshot point.

If the command is killed before the transaction, a guardian closes the overlays, and `pageferry disks commit` removes
their files. If it is killed afterwards, the guest runs on the overlays, and `pageferry disks commit` writes them back.
If the checkpoint fails, it writes the overlays back itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host.blocking import in_thread, to_the_end
from pageferry.host.fault_points import fault_point
from pageferry.workloads.protocols import SavedDisk
from pageferry.workloads.qemu import block_jobs, disk_files, frozen_files, qcow2
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord
from pageferry.workloads.qemu.block_jobs import Progress
from pageferry.workloads.qemu.disk_saving import (
    DiskSaving,
    ImageOfGuest,
    SavingGuest,
    as_before,
    deletion,
    file_of_disk,
    opening,
    path_of,
    stem_of,
)
from pageferry.workloads.qemu.frozen_files import Need

log = logging.getLogger(__name__)


class Overlay(NamedTuple):
    """Overlay of one disk."""

    disk: BlockDevice
    """Device before the transaction."""
    file: Path
    """File of the disk, which the transaction freezes."""
    path: Path
    """File of the overlay."""
    node: str
    """Block node of the overlay."""


class DiskFreezing(DiskSaving):
    """Mode `snapshot`. `folder`: directory of the overlays; None for the directory of each disk."""

    def __init__(self, guest: SavingGuest, image: ImageOfGuest, folder: Path | None) -> None:
        super().__init__(guest, image)
        self._folder = folder
        self._overlays: list[Overlay] = []
        self._sent = False
        """Whether QEMU may have executed the transaction. If the command was interrupted, the reply is unknown."""

    async def prepare(self) -> None:
        """Create, record and open the overlays."""
        await super().prepare()
        planned: list[Overlay] = []
        for number, disk in enumerate(self._disks()):
            planned.append(self._plan(number, disk, {one.path for one in planned}))
        for overlay in planned:
            await in_thread(remove_unused, overlay.file, self.guest.storage.paths())
        if planned:
            self._watch([self._commands([deletion(overlay.node) for overlay in planned])])
        for overlay in planned:
            await to_the_end(in_thread(self._create, overlay))
            # Otherwise, QEMU would open the backing file in the header, a second time and with other locks.
            await self._run(opening(overlay.node, overlay.path, overlay.disk, {"backing": None}))
        fault_point("disks.prepared")

    def _plan(self, number: int, disk: BlockDevice, used: set[Path]) -> Overlay:
        file = file_of_disk(disk, self.guest.pid)
        if len(os.fsencode(file)) > qcow2.MAX_BACKING_PATH:
            raise UnsupportedError(
                f"cannot freeze disk {disk.shown}: the path {file} is too long for a qcow2 overlay; move the disk"
            )
        path = (self._folder or file.parent).absolute() / f"{stem_of(file)}-{self.image.short_id}.qcow2"
        if path in used:  # disks of the same name in several directories
            path = path.with_name(f"{stem_of(file)}-{number}-{self.image.short_id}.qcow2")
        return Overlay(disk, file, path, f"pageferry-{self.image.short_id}-{number}")

    def _create(self, overlay: Overlay) -> None:
        top = overlay.disk.layers[0]
        descriptor = self._new_file(overlay.path, f"the overlay of disk {overlay.disk.shown}")
        try:
            qcow2.write_empty(descriptor, top.size, qcow2.Backing(str(overlay.file), top.format))
            os.fsync(descriptor)
            frozen_files.require(overlay.file, Need(kind="overlay", path=str(overlay.path), prepared=True))
            self._overlays.append(overlay)
        except WorkloadError:
            overlay.path.unlink(missing_ok=True)
            raise
        except OSError as error:
            overlay.path.unlink(missing_ok=True)
            raise WorkloadError(
                f"cannot create {overlay.path}, the overlay of disk {overlay.disk.shown}: {error.strerror}; free some "
                "space, or choose another directory"
            ) from error
        finally:
            os.close(descriptor)

    async def freeze(self) -> None:
        """Make all overlays active in one transaction."""
        if not self._overlays:
            return
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": one.disk.node, "overlay": one.node}}
            for one in self._overlays
        ]
        self._sent = True
        await self._run({"execute": "transaction", "arguments": {"actions": actions}})
        fault_point("disks.frozen")
        self._watch([])

    def before(self, devices: tuple[BlockDevice, ...]) -> tuple[BlockDevice, ...]:
        """Return the devices without the overlays."""
        overlays = {one.node: one.disk for one in self._overlays}
        return tuple(_below(device, overlays) for device in devices)

    @property
    def is_complete_record(self) -> bool:
        """True: the image refers to all disks."""
        return True

    async def complete(self, record: DiskRecord | None, progress: Progress) -> DiskRecord | None:
        """Make the frozen files read-only, record that the image needs them, and return the record of the disks."""
        self._unwatch()
        if record is None or not self._overlays:
            return record
        ids = {one.disk.id for one in self._overlays}
        for overlay in self._overlays:
            await to_the_end(in_thread(_seal, overlay, self.image.need, self.guest.pid))
        fault_point("disks.sealed")
        self.saved = tuple(
            SavedDisk(id=one.disk.id, name=one.disk.shown, path=str(one.file), overlay=str(one.path))
            for one in self._overlays
        )
        # The files no longer change, so their modification times can be determined without a doubt.
        await self.guest.storage.note(self.before(self.guest.devices()), at_rest=True)
        if (noted := self.guest.storage.noted) is not None:
            record = noted.record
        devices = (replace(one, saved=one.layers) if one.id in ids else one for one in record.devices)
        return replace(record, devices=tuple(devices))

    async def _undo(self) -> None:
        """Close and remove the overlays; write them back first if they are active. An overlay that QEMU may use is
        kept."""
        nodes = [one.node for one in self._overlays]
        used = set(nodes) if self._sent else set()
        with self._logged():
            used = await self._close(nodes)
        if used and self._sent:
            with self._logged():
                await self._write_back([one for one in self._overlays if one.node in used])
            with self._logged():
                used = await self._close(nodes)
        for overlay in self._overlays:
            with self._logged():
                if overlay.node in used:
                    await in_thread(frozen_files.seal, overlay.file)
                else:
                    await in_thread(discard_overlay, overlay.file, overlay.path, self.image.need)
        if kept := [str(one.path) for one in self._overlays if one.node in used]:
            log.warning(
                "%s: the overlays %s are kept, because the guest may write to them; write them back with `pageferry "
                "disks commit %s`",
                *(self.guest.name, ", ".join(kept), self.guest.name),
            )

    async def _write_back(self, overlays: Sequence[Overlay]) -> None:
        commits: dict[str, dict[str, Any]] = {}
        for overlay in overlays:
            await in_thread(frozen_files.unseal, overlay.file)
            commits[block_jobs.commit_id(overlay.path)] = {"device": overlay.node, "base-node": overlay.disk.node}
        try:
            await block_jobs.commit(self.guest.control, commits, lambda done, total: None)
        finally:
            await block_jobs.dismiss(self.guest.control, list(commits))


def discard_overlay(file: Path, overlay: Path, *needs: Need) -> None:
    """Remove an overlay that is not in use, and its entry in the record of the frozen file. `needs`: other entries that
    are removed too. Raises OSError, WorkloadError."""
    overlay.unlink(missing_ok=True)
    frozen_files.release(file, Need(kind="overlay", path=str(overlay)), *needs)


def remove_unused(file: Path, in_use: frozenset[str]) -> list[Path]:
    """Remove overlays of a file that a killed command has left and that contain no data. `in_use`: paths of all images
    that the guest uses. Return the paths of the removed files."""
    found = frozen_files.find(file)
    removed = []
    for need in found.needs if found is not None else ():
        path = Path(need.path)
        if need.prepared and need.path not in in_use and disk_files.is_unused_overlay(need.path):
            discard_overlay(file, path)
            removed.append(path)
    return removed


def _below(device: BlockDevice, overlays: dict[str, BlockDevice]) -> BlockDevice:
    disk = overlays.get(device.node)
    if disk is None:
        return device
    return as_before(replace(device, layers=device.layers[1:]), disk)


def _seal(overlay: Overlay, need: Need, pid: int) -> None:
    frozen_files.require(overlay.file, need)
    frozen_files.seal(overlay.file)
    for layer in overlay.disk.layers[1:]:  # files that were frozen by earlier checkpoints
        path = path_of(layer, pid)
        if frozen_files.find(path) is not None:
            frozen_files.require(path, need)
