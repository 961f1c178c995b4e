"""Choice of the disks that a migration copies: writable disks that the two sides do not share.

All other disks have to be the same on both sides, as without copying. A disk is only copied to an image that contains
no data, so that a wrong path at the destination destroys nothing. Of a block device, only the first and the last MiB
are read. The device must therefore be known to differ from that of the source: a copy of a device to itself would
overwrite what the guest writes.
"""

from __future__ import annotations

from pageferry.errors import WorkloadError
from pageferry.workloads.qemu import disk_comparison
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord, Host, Layer
from pageferry.workloads.qemu.disk_comparison import Sameness
from pageferry.workloads.qemu.storage import Storage

_CHECKED = frozenset({"raw", "qcow2"})
"""Formats of images in files for which it can be determined whether they contain data."""


def choose(
    theirs: DiskRecord | None, ours: DiskRecord, here: str, storage: Storage, *, shared: bool
) -> tuple[int, ...]:
    """Return the indexes of the disks to copy, in `media` of both records.

    `theirs`, `ours`, `here`, `shared`: as for `disk_comparison.check_migration`. `shared` applies to read-only disks,
    and to block devices of unknown identity. Raises WorkloadError, with the reason, if a disk has another size, or
    cannot be copied to.
    """
    disk_comparison.check_structure(theirs, ours, here, formats=False)
    if theirs is None:
        return ()
    chosen = []
    for number, (one, other) in enumerate(zip(theirs.media, ours.media, strict=True)):
        same = disk_comparison.sameness(one.layers[0], other.layers[0], theirs.host, ours.host) is Sameness.SAME
        if one.read_only or same:
            _check_formats(one, other, here)
            if not shared:
                disk_comparison.check_same(theirs, ours, one, other, here)
        elif _may_be_one_device(one.layers[0], other.layers[0], theirs.host, ours.host):
            _check_formats(one, other, here)
            _check_shared_device(one, other, here, storage, shared=shared)
        else:
            _check_target(other, here, storage)
            chosen.append(number)
    return tuple(chosen)


def _check_formats(one: BlockDevice, other: BlockDevice, here: str) -> None:
    for theirs, ours in disk_comparison.differences(one, other, formats=True):
        raise WorkloadError(
            f"the disks do not match: {one.shown} of the source {theirs}, {other.shown} of {here} {ours}; start the "
            "destination with the options of the source"
        )


def _may_be_one_device(one: Layer, other: Layer, there: Host, here: Host) -> bool:
    """Return whether two images are block devices of two hosts whose world-wide names do not show that they differ: a
    name is missing, or one of them is a multipath device of the other (`mpath-3` and the number after `naa.`)."""
    if one.file is None or other.file is None or not one.file.kind == other.file.kind == "device":
        return False
    if disk_comparison.sameness(one, other, there, here) is not Sameness.UNKNOWN:
        return False
    names = one.file.serial, other.file.serial
    numbers = [name.partition(".")[2] or name for name in names]
    return not all(names) or any(
        name.startswith("mpath-") and number in name for name, number in zip(names, reversed(numbers), strict=True)
    )


def _check_shared_device(one: BlockDevice, other: BlockDevice, here: str, storage: Storage, *, shared: bool) -> None:
    """Raise WorkloadError unless the user has stated that both sides share a block device, and the device contains
    data."""
    place = f"{other.layers[0].path} ({other.shown} of {here})"
    if not shared:
        raise WorkloadError(
            f"cannot determine whether {place} is {one.layers[0].path} of the source: the world-wide names of the "
            "devices do not show that they are different; to copy the disk, use a file at the destination; if both "
            'are the same storage, use --disks shared (in Python disks="shared") in addition'
        )
    if storage.is_empty(other.layers[0]):
        raise WorkloadError(
            f"cannot determine whether {place} is shared, or an empty device for a copy of {one.layers[0].path}: its "
            "first and its last MiB contain only zeros; if it is shared, omit --copy-disks; otherwise use a file at "
            "the destination"
        )


def _check_target(device: BlockDevice, here: str, storage: Storage) -> None:
    """Raise WorkloadError unless a disk may be overwritten by a copy."""
    target = device.layers[0]
    place = f"{target.path} ({device.shown} of {here})"
    if len(device.layers) > 1:
        raise WorkloadError(
            f"cannot copy a disk to {place}: it is an overlay over {device.layers[1].path}; use an image without a "
            "backing file"
        )
    if target.file is None:
        raise WorkloadError(
            f"cannot copy a disk to {place}: it is not a file or block device of that host; use an image there"
        )
    if target.file.kind == "device":
        if not storage.is_empty(target):
            raise WorkloadError(
                f"cannot copy a disk to {place}: the first and the last MiB of the device contain other bytes than "
                "zeros; if nothing on it is needed, erase it (`blkdiscard -z`)"
            )
        return
    if target.format not in _CHECKED:
        raise WorkloadError(f"cannot copy a disk to {place}: its format is {target.format}; use raw or qcow2")
    if not storage.is_empty(target):
        raise WorkloadError(
            f"cannot copy a disk to {place}: it contains data, which would be overwritten; use a new image of "
            f"{target.size} bytes, or remove its data if it remains from a failed migration"
        )
