"""Modes of `checkpoint --disks`."""

from __future__ import annotations

from pathlib import Path

from pageferry.workloads.qemu.disk_copying import DiskCopying
from pageferry.workloads.qemu.disk_freezing import DiskFreezing
from pageferry.workloads.qemu.disk_saving import DiskSaving, ImageOfGuest, SavingGuest


def saving(mode: str, guest: SavingGuest, image: ImageOfGuest, folder: Path | None, bandwidth: int = 0) -> DiskSaving:
    """Return the object that saves the disks of a guest for an image.

    `mode`: `record`, `snapshot` or `copy`. `folder`: directory of new files; None for that of each disk, except in the
    mode `copy`. `bandwidth`: limit for all copies together, bytes per second, 0 for none.
    """
    match mode:
        case "snapshot":
            return DiskFreezing(guest, image, folder)
        case "copy":
            assert folder is not None, "the options have been checked"
            return DiskCopying(guest, image, folder, bandwidth)
        case _:
            return DiskSaving(guest, image)
