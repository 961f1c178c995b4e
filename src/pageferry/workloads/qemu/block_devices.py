"""Block devices of a QEMU guest: the record of its disks, and the QMP replies from which the record is built.

`query-block` reports the devices in the order in which the guest has them, each with the image that backs it and the
chain of backing images. `query-named-block-nodes` adds the driver that accesses the file of an image. The record is a
detail of the guest's identity: the first message of a migration and every image contain it. A flash device with UEFI
variables is a block device as well. A TPM is recorded as a device whose contents are in the device state.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pageferry.errors import WorkloadError
from pageferry.workloads.protocols import DISKS

VERSION = 1
"""Version of records. Later versions may add fields, which earlier versions ignore."""

MAX_RECORD = 256 << 10
"""Maximum size of a decompressed record, bytes."""

_FILTERS = frozenset(
    """blkdebug blklogwrites blkreplay blkverify compress copy-before-write copy-on-read preallocate
    snapshot-access throttle""".split()
)
"""Block drivers that change requests, but not the contents of the image below them."""

_FORMATS = frozenset("bochs cloop dmg luks parallels qcow qcow2 qed raw replication vdi vhdx vmdk vpc vvfat".split())
"""Block drivers of image formats. All others except filters access a file, a device or a server."""

_ON_HOST = frozenset({"file", "host_device", "host_cdrom"})
"""Block drivers of images in a file or a device of the host."""


class Generation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """State of a file at one moment. A write changes the state."""

    size: int
    """Size, bytes."""
    modified: int
    """Time of the last modification, nanoseconds since 1970."""
    settled: bool = True
    """Whether a write after that moment was certain to change `modified`. False if the file was written to in the same
    tick of the clock for modification times."""


class File(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """File or device that a QEMU process has open."""

    kind: Literal["file", "device"] = "file"
    device: int
    """Device number of the file system, or of the block device itself. It is valid on one host, until the host
    restarts."""
    inode: int = 0
    """Inode number of a file."""
    fsid: int = 0
    """Identifier of the file system (`f_fsid` of statvfs(3)), or 0."""
    fs: str = ""
    """Type of the file system, such as `nfs4`."""
    source: str = ""
    """Source of the mount, such as `server:/export`."""
    serial: str = ""
    """World-wide name of a block device, or UUID of a device-mapper device; empty if it has none."""
    generation: Generation | None = None
    """State of the file when the record was made; None if it was not read, and for devices."""


_TEMPORARY = re.compile(r"(?:^|/)vl\.[A-Za-z0-9]{6}$")
"""Path of an overlay that QEMU has created for `snapshot=on`."""


class Layer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Image in a backing chain."""

    format: str
    path: str
    """Path, or URI of an export. An image that has neither is described by JSON, as in QEMU."""
    size: Annotated[int, Meta(ge=0)]
    """Size of the disk that the image contains, bytes."""
    offset: int = 0
    """Start of a raw image in its file, bytes."""
    driver: str = ""
    """Block driver that accesses the file, such as `file` or `nbd`; empty if it is not known."""
    file: File | None = None
    """File of the image; None if it is on a server, or cannot be found among the files that QEMU has open."""

    @property
    def generation(self) -> Generation | None:
        """State of the file when the record was made; None if it is not known."""
        return self.file.generation if self.file is not None else None

    @property
    def temporary(self) -> bool:
        """Whether QEMU has created the image for `snapshot=on`. Such a file is removed as soon as QEMU has opened
        it."""
        return self.format == "qcow2" and _TEMPORARY.search(self.path) is not None


class BlockDevice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Disk, drive, flash device or TPM of a guest."""

    id: str
    """Id or QOM path of the device; the name of its drive if the user has given the device no id."""
    name: str = ""
    """Name of the drive or of the block node, for error messages."""
    node: str = ""
    """Name of the block node, which changes if the medium is replaced."""
    read_only: bool = False
    cache: str = ""
    """Use of the host's page cache: `buffered`, or `direct` without it; `buffered,no-flush` if flushes are ignored. The
    write cache of the device is not recorded, because the guest itself enables it."""
    layers: tuple[Layer, ...] = ()
    """Backing chain, the image that is written to first; empty for a drive without a medium."""
    in_state: bool = False
    """Whether the device state contains the contents: the state of a TPM."""
    saved: tuple[Layer, ...] = ()
    """Backing chain with the contents as of the snapshot point, for an image that was written with its disks: `layers`
    if they were frozen, or a copy. Empty if the contents were not saved."""

    @property
    def frozen(self) -> bool:
        """Whether the contents were saved by freezing the files of the device, and not by a copy."""
        return bool(self.saved) and self.saved[0].path == self.layers[0].path

    @property
    def shown(self) -> str:
        """Text that names the device in error messages."""
        return self.name or self.id


class Host(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Host on which a record was made, as digests of its ids."""

    boot: str = ""
    """Digest of the boot id."""
    machine: str = ""
    """Digest of the machine id, which restarts do not change."""


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Record of all block devices of a guest, in the order in which the guest has them."""

    version: int = VERSION
    host: Host = Host()
    devices: tuple[BlockDevice, ...] = ()

    @property
    def media(self) -> tuple[BlockDevice, ...]:
        """Devices with contents that are outside of the device state."""
        return tuple(device for device in self.devices if device.layers and not device.in_state)

    @property
    def saved(self) -> tuple[BlockDevice, ...]:
        """Devices whose contents were saved with the image."""
        return tuple(device for device in self.devices if device.saved)

    @property
    def as_saved(self) -> DiskRecord:
        """Record with the saved contents of each device as its backing chain, for a restore."""
        devices = (msgspec.structs.replace(one, layers=one.saved or one.layers) for one in self.devices)
        return msgspec.structs.replace(self, devices=tuple(devices))


def time_text(nanoseconds: int) -> str:
    """Return a time since 1970 as text: UTC, ISO 8601, with microseconds."""
    seconds, rest = divmod(nanoseconds, 10**9)
    try:
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1000:06}Z"
    except (ValueError, OverflowError, OSError):  # the record may come from another host
        return f"{seconds} s"


# -- encoding ----------------------------------------------------------------------------------------------------------


def encode(record: DiskRecord) -> str:
    """Return a record as text for a detail: JSON, compressed by zlib, in base64. Raises WorkloadError if the record is
    too long."""
    data = msgspec.json.encode(record)
    if len(data) > MAX_RECORD:
        raise WorkloadError(
            f"cannot describe the disks of the guest: the description is longer than {MAX_RECORD >> 10} KiB"
        )
    return base64.b64encode(zlib.compress(data)).decode()


def decode(details: Mapping[str, Any]) -> DiskRecord | None:
    """Return the record in the details of a guest; None if they contain no record, or a record of another version.

    Raises WorkloadError if the record is invalid: it is received from a peer, or read from a file.
    """
    text = details.get(DISKS)
    if text is None:
        return None
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_RECORD)
        if not unpacker.eof:
            raise WorkloadError(f"invalid record of disks: it is incomplete, or larger than {MAX_RECORD >> 10} KiB")
        if msgspec.json.decode(data, type=_Versioned).version != VERSION:
            return None
        return msgspec.json.decode(data, type=DiskRecord)
    except (ValueError, TypeError, zlib.error, binascii.Error) as wrong:
        raise WorkloadError(f"invalid record of disks: {wrong}") from wrong


class _Versioned(msgspec.Struct):
    version: int


# -- replies of QEMU ---------------------------------------------------------------------------------------------------


def parse(blocks: Sequence[Mapping[str, Any]]) -> tuple[BlockDevice, ...]:
    """Return the devices in a reply to `query-block`, without the drivers and files of their images.

    Drives that no device of the guest uses are left out.
    """
    return tuple(_device(block) for block in blocks if block.get("qdev"))


def parse_tpms(tpms: Sequence[Mapping[str, Any]]) -> tuple[BlockDevice, ...]:
    """Return the devices in a reply to `query-tpm`."""
    return tuple(
        BlockDevice(
            id=tpm["id"],
            layers=(Layer(format=f"tpm-{tpm['options']['type']}", path=tpm["model"], size=0),),
            in_state=True,
        )
        for tpm in tpms
    )


def drivers(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the drivers in a reply to `query-named-block-nodes` that access a file, a device or a server, by the path
    or URI."""
    return {
        location(node["file"])[0]: node["drv"]
        for node in nodes
        if node["drv"] not in _FORMATS and node["drv"] not in _FILTERS
    }


def _device(block: Mapping[str, Any]) -> BlockDevice:
    qdev, drive = str(block["qdev"]), str(block.get("device", ""))
    inserted = block.get("inserted", {})
    return BlockDevice(
        # The number of a device in `/machine/unattached` depends on the QEMU version.
        id=drive if drive and qdev.startswith("/machine/unattached/") else _short(qdev),
        name=drive or inserted.get("node-name", ""),
        node=inserted.get("node-name", ""),
        read_only=inserted.get("ro", False),
        cache=_cache(inserted["cache"]) if "cache" in inserted else "",
        layers=tuple(_layers(inserted.get("image"))),
    )


def _cache(mode: Mapping[str, bool]) -> str:
    return ("direct" if mode["direct"] else "buffered") + (",no-flush" if mode["no-flush"] else "")


def _short(path: str) -> str:
    """Return a QOM path without the parts that all devices have."""
    short = path.removesuffix("/virtio-backend").removeprefix("/machine/")
    return short.removeprefix("peripheral/")


def _layers(image: Mapping[str, Any] | None) -> Iterator[Layer]:
    while image is not None:
        if image["format"] not in _FILTERS:
            path, offset = location(image["filename"])
            yield Layer(format=image["format"], path=path, size=image["virtual-size"], offset=offset)
        image = image.get("backing-image")


def location(filename: str) -> tuple[str, int]:
    """Return the path or URI of an image, and the offset in it, from a file name as QEMU reports it."""
    if not filename.startswith("json:"):
        return filename, 0
    try:
        node = json.loads(filename.removeprefix("json:"))
    except ValueError:
        return filename, 0
    offset = 0
    while isinstance(node, dict) and isinstance(node.get("file"), dict):
        offset += int(node.get("offset", 0))
        node = node["file"]
    if isinstance(node, dict) and node.get("driver") in _ON_HOST and "filename" in node:
        return str(node["filename"]), offset
    return json.dumps(node, sort_keys=True), offset
