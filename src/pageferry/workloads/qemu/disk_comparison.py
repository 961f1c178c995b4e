"""Comparison of the disks of a guest with those of its source, or with those that an image has recorded.

QEMU itself does not compare disks. A guest whose disk contains other data than before corrupts its file systems, so
disks are refused unless they are known to be the same:

- Ids, order, sizes, formats and the read-only flag have to be equal.
- Files are the same if they have the same inode on one host, or on one server. Block devices are the same if they have
  the same number on one host, or the same world-wide name. Exports are the same if they have the same URI.
- A restore also requires that no file has been written to since the checkpoint: size and modification time are those
  that the image has recorded. Empty overlays over these files are accepted, because they contain no data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum

import msgspec

from pageferry.errors import DisksDiffer, WorkloadError
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord, File, Host, Layer, time_text

_MAX_SHOWN = 200
"""Maximum number of characters of a path or a name in an error message."""

_EXPORTS = frozenset("ftp ftps gluster http https iscsi nbd nfs null-aio null-co rbd ssh".split())
"""Block drivers of exports, whose URI identifies the contents, and of disks without contents."""

_NETWORK = frozenset("ceph fuse.glusterfs lustre nfs nfs4".split())
"""File systems of servers on which inode numbers are those of the server, equal on all hosts."""
_CLUSTER = frozenset({"gfs2", "ocfs2"})
"""File systems on a block device that several hosts share. `f_fsid` identifies them on all hosts."""

_ONE_HOST = re.compile(r"localhost|\b127\.|(?<![\da-f:])::1(?![\da-f:])|unix|socket", re.IGNORECASE)
"""Part of a URI, or of the source of a mount, that names a different server on each host."""
_SERVER = re.compile(r"[^/:]+:|\[[\da-fA-F:]+\]:|[^/=]+=/")
"""Beginning of the source of a mount that names a server."""


CHANGED = (
    "the image does not describe the contents of disks, because disks or media were changed during the checkpoint; "
    "save the guest again"
)
"""Warning for images of guests whose disks were changed."""


class Sameness(StrEnum):
    """Result of the comparison of two images."""

    SAME = "same"
    OTHER = "other"
    UNKNOWN = "unknown"


def check_migration(theirs: DiskRecord | None, ours: DiskRecord, here: str, *, shared: bool) -> None:
    """Raise WorkloadError, with the reason, if the disks `ours` of a destination are not those of the source.

    `theirs`: record of the source; None if the source does not send any. `here`: name of the destination, for error
    messages. `shared`: assume that the disks of both sides are the same; their ids, order, sizes and formats are still
    compared.
    """
    check_structure(theirs, ours, here, formats=True)
    if theirs is not None and not shared:
        for one, other in zip(theirs.media, ours.media, strict=True):
            check_same(theirs, ours, one, other, here)


def check_structure(theirs: DiskRecord | None, ours: DiskRecord, here: str, *, formats: bool) -> None:
    """Raise WorkloadError, with the reason, if the ids, order, sizes, read-only flags or, with `formats`, the formats
    of the disks `ours` of a destination are not those of the source."""
    if theirs is None:
        if ours.media:
            raise WorkloadError(
                f"the disks do not match: the source describes no disks, but {here} has disks; start the destination "
                "with the options of the source, and use the same release of pageferry on both hosts"
            )
        return
    for difference in _structure(theirs, ours, ("the source", here), formats=formats):
        raise WorkloadError(
            f"the disks do not match: {difference}; start the destination with the options of the source"
        )


def check_restore(recorded: DiskRecord | None, ours: DiskRecord, image: str, here: str, *, as_is: bool) -> None:
    """Raise DisksDiffer, with the reason, if the disks `ours` of a guest are not those that an image has recorded, or
    if this cannot be determined.

    `recorded`: record in the image; None if it contains none. `ours`: record with the generation of each file, without
    empty overlays (see `without_overlays`). `image`, `here`: names of both sides, for error messages. `as_is`: accept
    any contents; ids, order, sizes and the read-only flag are still compared.
    """
    if recorded is None:
        if ours.media and not as_is:
            raise DisksDiffer(f"{image} describes no disks, but {here} has disks; {_AS_IS}")
        return
    for difference in _structure(recorded, ours, (image, here), formats=not as_is):
        raise DisksDiffer(f"the disks do not match: {difference}; start QEMU with the options of the saved guest")
    if not as_is:
        for before, now in zip(recorded.media, ours.media, strict=True):
            for layer, current in zip(before.layers, now.layers, strict=True):
                _check_unchanged(now, layer, current, recorded.host, ours.host)


_AS_IS = (
    "if the disk contains what it contained at the checkpoint, for example because it was copied while the guest "
    'was paused, use --disks as-is (in Python disks="as-is")'
)


# -- ids, order, sizes, formats ----------------------------------------------------------------------------------------


def _structure(theirs: DiskRecord, ours: DiskRecord, names: tuple[str, str], *, formats: bool) -> Iterator[str]:
    """Yield each difference of ids, order, sizes, read-only flags and, with `formats`, of formats. `names`: names of
    both sides."""
    ids = [device.id for device in theirs.devices], [device.id for device in ours.devices]
    if ids[0] != ids[1]:
        yield f"{names[0]} has {_list(theirs)}, {names[1]} has {_list(ours)}"
        return
    for one, other in zip(theirs.devices, ours.devices, strict=True):
        for theirs_shown, ours_shown in differences(one, other, formats=formats):
            yield f"{_cut(one.shown)} of {names[0]} {theirs_shown}, {_cut(other.shown)} of {names[1]} {ours_shown}"


def differences(one: BlockDevice, other: BlockDevice, *, formats: bool) -> Iterator[tuple[str, str]]:
    """Yield, for each difference of two devices, what each of them has."""
    if not one.layers or not other.layers:
        if one.layers or other.layers:
            yield "has a medium" if one.layers else "is empty", "has a medium" if other.layers else "is empty"
        return
    if one.layers[0].size != other.layers[0].size:
        yield f"has {one.layers[0].size} bytes", f"has {other.layers[0].size} bytes"
    if one.read_only != other.read_only:
        yield "is read-only" if one.read_only else "is writable", "is read-only" if other.read_only else "is writable"
    if (formats or one.in_state) and _formats(one) != _formats(other):
        yield f"has the format {_chain(one)}", f"has the format {_chain(other)}"


def _formats(device: BlockDevice) -> tuple[bool, list[tuple[str, int]]]:
    """Return the values that have to be equal if formats are compared. The number of layers has to be equal, too."""
    return device.in_state, [(layer.format, layer.offset) for layer in device.layers]


def _chain(device: BlockDevice) -> str:
    formats = [layer.format + (f" at offset {layer.offset}" if layer.offset else "") for layer in device.layers]
    return _cut(" over ".join(formats)) + (" in the device state" if device.in_state else "")


def _list(record: DiskRecord) -> str:
    names = [_cut(device.id) + ("" if device.layers else " (empty)") for device in record.devices]
    return "the drives " + _cut(", ".join(names)) if names else "no drives"


# -- identity ----------------------------------------------------------------------------------------------------------


def check_same(theirs: DiskRecord, ours: DiskRecord, one: BlockDevice, other: BlockDevice, here: str) -> None:
    """Raise WorkloadError if two devices do not have the same images."""
    if one.layers[0].temporary:
        raise WorkloadError(
            f"the disks do not match: {_cut(one.shown)} of the source has a temporary overlay (snapshot=on), and the "
            "destination does not have its data; copy the disk (--copy-disks, in Python copy_disks=True), to a "
            f"destination without snapshot=on; if the guest has not written to the disk, use {_SHARED}"
        )
    for layer, current in zip(one.layers, other.layers, strict=True):
        match sameness(layer, current, theirs.host, ours.host):
            case Sameness.SAME:
                continue
            case Sameness.OTHER:
                cause = f"is not {_cut(layer.path)} of the source{_belongs(theirs, ours, current)}"
                advice = "start the destination with the disks of the source, in the same order"
            case Sameness.UNKNOWN:
                cause = f"cannot be shown to be {_cut(layer.path)} of the source"
                advice = "use storage that both hosts mount from one server"
        raise WorkloadError(
            f"the disks do not match: {_cut(current.path)} ({_cut(other.shown)} of {here}) {cause}; {advice}; if both "
            f"are the same storage, use {_SHARED}"
        )


_SHARED = '--disks shared (in Python disks="shared")'


def _belongs(theirs: DiskRecord, ours: DiskRecord, current: Layer) -> str:
    """Return a remark if an image is that of another disk of the source; otherwise an empty string."""
    for device in theirs.media:
        if sameness(device.layers[0], current, theirs.host, ours.host) is Sameness.SAME:
            return f", but {_cut(device.shown)}"
    return ""


def sameness(one: Layer, other: Layer, there: Host, here: Host, *, restarted: bool = False) -> Sameness:
    """Compare two images, which were seen on the hosts `there` and `here`.

    `restarted`: whether the first host may have been restarted since and be the second one. Running hosts with the same
    machine id are different hosts, for example clones of one virtual machine.
    """
    same_boot = bool(there.boot) and there.boot == here.boot
    if one.file is None or other.file is None:
        exported = one.file is None and other.file is None and one.driver in _EXPORTS and one.driver == other.driver
        if exported and one.path == other.path and (same_boot or not _ONE_HOST.search(one.path)):
            return Sameness.SAME
        return Sameness.OTHER if exported and same_boot else Sameness.UNKNOWN
    if _same_storage(one.file, other.file):
        return Sameness.SAME
    if same_boot:
        ours = (one.file.kind, one.file.device, one.file.inode)
        return Sameness.SAME if ours == (other.file.kind, other.file.device, other.file.inode) else Sameness.OTHER
    if restarted and there.machine and there.machine == here.machine and _same_after_restart(one.file, other.file):
        return Sameness.SAME
    return Sameness.UNKNOWN


def _same_storage(one: File, other: File) -> bool:
    """Return whether two files or devices are the same, regardless of the hosts."""
    if one.kind != other.kind:
        return False
    if one.kind == "device":
        return bool(one.serial) and one.serial == other.serial
    if one.inode != other.inode or one.fs != other.fs:
        return False
    if one.fs in _CLUSTER:
        return one.fsid != 0 and one.fsid == other.fsid
    named = bool(_SERVER.match(one.source)) and not _ONE_HOST.search(one.source)
    return one.fs in _NETWORK and named and one.source == other.source


def _same_after_restart(one: File, other: File) -> bool:
    """Return whether two files are the same if their host was restarted: device numbers may change, but file systems
    keep their ids."""
    ours, theirs = ((file.kind, file.fs, file.fsid, file.inode) for file in (one, other))
    return one.kind == "file" and one.fsid != 0 and ours == theirs


# -- generation --------------------------------------------------------------------------------------------------------


def without_overlays(record: DiskRecord, empty: frozenset[str], recorded: DiskRecord) -> DiskRecord:
    """Return a record without the overlays that the guest has in addition to the `recorded` chains, if they contain no
    data. `empty`: paths of overlays without data."""
    if len(record.devices) != len(recorded.devices):
        return record
    pairs = zip(record.devices, recorded.devices, strict=True)
    devices = tuple(_without_overlays(device, empty, len(before.layers)) for device, before in pairs)
    return msgspec.structs.replace(record, devices=devices)


def _without_overlays(device: BlockDevice, empty: frozenset[str], count: int) -> BlockDevice:
    """Remove empty overlays of the size of the image below, until `count` images are left."""
    layers = device.layers
    while len(layers) > max(count, 1) and layers[0].path in empty and layers[0].size == layers[1].size:
        layers = layers[1:]
    return msgspec.structs.replace(device, layers=layers)


def _check_unchanged(device: BlockDevice, before: Layer, now: Layer, there: Host, here: Host) -> None:
    """Raise DisksDiffer unless `now`, an image of a device, is the image `before` and has not been written to."""
    if before.temporary:
        raise DisksDiffer(
            f"the disk {_cut(device.shown)} was saved with a temporary overlay (snapshot=on), whose data was removed "
            "with the guest; save such a guest with --disks copy:DIR; if the guest had not written to the disk, use "
            '--disks as-is (in Python disks="as-is")'
        )
    image = f"{_cut(now.path)} ({_cut(device.shown)})"
    if sameness(before, now, there, here, restarted=True) is not Sameness.SAME:
        raise DisksDiffer(f"{image} cannot be shown to be {_cut(before.path)}, the disk of the checkpoint; {_AS_IS}")
    was, current = before.generation, now.generation
    if was is None or current is None:
        raise DisksDiffer(f"cannot determine whether {image} has changed since the checkpoint; {_AS_IS}")
    if (was.size, was.modified) != (current.size, current.modified):
        raise DisksDiffer(
            f"{image} has changed since the checkpoint: it was last modified at {time_text(current.modified)}, and "
            f"before the checkpoint at {time_text(was.modified)}; use a copy that was made while the guest was paused "
            'for the checkpoint, and --disks as-is (in Python disks="as-is")'
        )
    if not was.settled:
        raise DisksDiffer(
            f"cannot determine whether {image} has changed since the checkpoint, because it had been written to "
            f"milliseconds before; {_AS_IS}"
        )


def unsaved(record: DiskRecord) -> str | None:
    """Return a warning for images that do not contain the disks of their guest; None if the guest cannot write to any
    disk."""
    names = [_cut(device.shown) for device in record.media if not device.read_only]
    if not names:
        return None
    temporary = [_cut(device.shown) for device in record.media if device.layers[0].temporary]
    lost = f"; the data in temporary overlays (snapshot=on: {', '.join(temporary)}) will be lost with the guest"
    return (
        f"the image does not contain the disks ({', '.join(names)}): a restore requires that they have not been "
        f"written to since{lost if temporary else ''}; to save their contents too, use "
        f"{'' if temporary else '--disks snapshot or '}--disks copy:DIR (in Python disks=...)"
    )


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
