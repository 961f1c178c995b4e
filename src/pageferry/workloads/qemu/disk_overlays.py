"""Overlays of restored guests over the disks that were saved with their image, one per guest and disk (S10).

The overlays are created before QEMU starts, and put into its command line (`disk_arguments`). A record beside each
saved disk names them, so that no guest writes to a saved disk while an overlay needs it (`frozen_files`). An overlay
contains what the guest has written since its restore, and is kept when the guest ends.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from pageferry.errors import DisksDiffer, RestoreError, UsageError
from pageferry.host import files
from pageferry.workloads.qemu import disk_arguments, frozen_files, qcow2
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord
from pageferry.workloads.qemu.disk_saving import described, stem_of
from pageferry.workloads.qemu.frozen_files import Need


class GuestOverlays:
    """Overlays of one restored guest. The constructor creates them; `discard` removes them after a failed restore.

    `folder`: directory of the overlays; None for the directory of each saved disk. Raises RestoreError if an overlay
    cannot be created, DisksDiffer if a saved disk is missing, UsageError if the command line has no option for a disk.
    """

    def __init__(self, name: str, arguments: Sequence[str], record: DiskRecord, folder: Path | None) -> None:
        self._name = name
        self._paths: dict[str, tuple[Path, Path]] = {}
        """Saved disk and overlay by the id of the disk."""
        disks = record.saved
        planned = {disk.id: self._plan(disk, folder) for disk in disks}
        overlays = {id: str(overlay) for id, (_, overlay) in planned.items()}
        self.arguments = disk_arguments.replace_disks(arguments, overlays, disks)
        """Command line of QEMU with the overlays."""
        try:
            for disk in disks:
                self._create(disk, *planned[disk.id])
        except BaseException:
            self.discard()
            raise

    @property
    def paths(self) -> Mapping[str, Path]:
        """Path of each overlay, by the id of the disk."""
        return {id: overlay for id, (_, overlay) in self._paths.items()}

    def discard(self) -> None:
        """Remove the overlays. QEMU must not use them."""
        for saved, overlay in self._paths.values():
            overlay.unlink(missing_ok=True)
            frozen_files.release(saved, Need(kind="overlay", path=str(overlay)))
        self._paths.clear()

    def _plan(self, disk: BlockDevice, folder: Path | None) -> tuple[Path, Path]:
        """Return the paths of a saved disk and of its new overlay."""
        saved = Path(os.path.realpath(disk.saved[0].path))
        if not saved.is_file():
            raise DisksDiffer(
                f"cannot restore {self._name}: {described(disk.saved[0])}, the saved contents of disk {disk.shown}, "
                "does not exist; put the file back at this path"
            )
        if len(os.fsencode(saved)) > qcow2.MAX_BACKING_PATH:
            raise UsageError(
                f"cannot put an overlay on disk {disk.shown}: the path {saved} is too long for qcow2; move the disk"
            )
        overlay = f"{stem_of(saved)}-{self._name}-{secrets.token_hex(4)}.qcow2"
        return saved, (folder or saved.parent).absolute() / overlay

    def _create(self, disk: BlockDevice, saved: Path, overlay: Path) -> None:
        top = disk.saved[0]
        try:
            descriptor = files.create_new(overlay)
            self._paths[disk.id] = saved, overlay
            try:
                qcow2.write_empty(descriptor, top.size, qcow2.Backing(str(saved), top.format))
            finally:
                os.close(descriptor)
            frozen_files.require(saved, Need(kind="overlay", path=str(overlay)))
        except OSError as error:
            raise RestoreError(
                f"cannot create {overlay}, the overlay of disk {disk.shown}: {error.strerror}; choose another "
                "directory with --disks overlay:DIR"
            ) from error
