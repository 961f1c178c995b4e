"""Disks of one guest: the record for the peer of a migration and for images (see `block_devices`)."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from msgspec.structs import replace

from pageferry.host.blocking import in_thread
from pageferry.host.qmp import Monitor
from pageferry.workloads.protocols import DISKS
from pageferry.workloads.qemu import block_devices, disk_files
from pageferry.workloads.qemu.block_devices import BlockDevice, DiskRecord, Generation, Layer
from pageferry.workloads.qemu.disk_files import DiskFiles
from pageferry.workloads.qemu.machine import Machine

_POLL = 0.01
"""Interval of checks whether the modification times of files are settled (see `Generation`), seconds."""
_MAX_POLLS = 250

_FDSET = "/dev/fdset/"


class Noted(NamedTuple):
    """Devices of a paused guest, and their record."""

    devices: tuple[BlockDevice, ...]
    record: DiskRecord


class Storage:
    """Disks of one guest, with the files that QEMU has open. `pid`: process of QEMU."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._host = disk_files.host()
        self._drivers: dict[str, str] = {}
        """Block driver of each path or URI."""
        self._tpms: tuple[BlockDevice, ...] = ()
        self._files = DiskFiles(pid, {}, {})
        self._located: tuple[BlockDevice, ...] | None = None
        """Devices whose files have been found; None before `locate`."""
        self._text: tuple[tuple[BlockDevice, ...], str] | None = None
        """Encoded record of `details`, with the devices that it describes."""
        self.noted: Noted | None = None
        """Result of the last call of `note`; None if the guest had no devices."""

    async def locate(self, monitor: Monitor, machine: Machine) -> None:
        """Find the files of the block devices of a machine, unless they have been found. Raises WorkloadError,
        WorkloadDied."""
        devices = machine.block_devices or ()
        if devices == self._located:
            return
        if self._located is None and any(kind.startswith("tpm-") for kind, _ in machine.devices):
            self._tpms = block_devices.parse_tpms(await monitor.execute("query-tpm"))
        paths = [layer.path for device in devices for layer in device.layers]
        fdsets: dict[int, int] = {}
        if paths:
            self._drivers = block_devices.drivers(await monitor.execute("query-named-block-nodes", flat=True))
        if any(path.startswith(_FDSET) for path in paths):
            found = await monitor.execute("query-fdsets")
            fdsets = {one["fdset-id"]: one["fds"][0]["fd"] for one in found if one["fds"]}
        if paths:
            self._files = await in_thread(DiskFiles.find, self._pid, paths, fdsets)
        self._located, self._text = devices, None

    def details(self, devices: tuple[BlockDevice, ...]) -> dict[str, str]:
        """Return the record of these devices, without generations, as a detail of the guest; an empty dictionary if the
        guest has no devices."""
        if not devices and not self._tpms:
            return {}
        if self._text is None or self._text[0] != devices:
            self._text = devices, block_devices.encode(self.record(devices))
        return {DISKS: self._text[1]}

    def record(self, devices: tuple[BlockDevice, ...]) -> DiskRecord:
        """Return the record of these devices, without generations. The files of devices for which `locate` was not
        called are missing."""
        return self._record(devices, lambda path: None)

    def record_now(self, devices: tuple[BlockDevice, ...]) -> DiskRecord:
        """Return the record of these devices, with the current generation of each file."""
        return self._record(devices, self._files.generation)

    async def note(self, devices: tuple[BlockDevice, ...], *, at_rest: bool) -> None:
        """Store the record of these devices, with the current generation of each file, in `noted`.

        `at_rest`: the guest stays paused, so wait until later writes are certain to change the generations.
        """
        if not devices:
            self.noted = None
            return
        record = self.record_now(devices)
        for _ in range(_MAX_POLLS if at_rest else 0):
            if all(_settled(record)):
                break
            await asyncio.sleep(_POLL)
            record = self.record_now(devices)
        self.noted = Noted(devices, record)

    def paths(self) -> frozenset[str]:
        """Return the absolute paths of all images that the guest uses. Raises WorkloadError if the guest has
        exited."""
        layers = (layer for device in self._located or () for layer in device.layers)
        return frozenset(disk_files.absolute(layer.path, self._pid) for layer in layers)

    def places(self, devices: tuple[BlockDevice, ...]) -> list[str]:
        """Return the paths at which this process finds the files of all images to which these devices can write."""
        tops = [device.layers[0].path for device in devices if device.layers and not device.read_only]
        return [place for path in tops if (place := self._files.place(path)) is not None]

    def allocated(self, device: BlockDevice) -> int:
        """Return the estimated number of bytes of data in a disk: its size, or the space that the files of its images
        occupy, if that is less."""
        total, size = 0, device.layers[0].size
        for layer in device.layers:
            try:
                status = os.stat(self._files.place(layer.path) or "")
            except OSError:
                return size
            if not stat.S_ISREG(status.st_mode):
                return size
            total += status.st_blocks * 512
        return min(total, size)

    def settle(self) -> None:
        """Update the generations in `noted` if a later write could leave the time of a file unchanged.

        Call this just before the guest resumes. The time of a file that QEMU wrote just before `note` may still be the
        current time of the file system.
        """
        if self.noted is not None and not all(_settled(self.noted.record)):
            self.noted = Noted(self.noted.devices, self.record_now(self.noted.devices))

    def empty_overlays(self, devices: tuple[BlockDevice, ...]) -> frozenset[str]:
        """Return the paths of overlays that contain no data."""
        paths = [layer.path for device in devices for layer in device.layers[:-1]]
        return frozenset(path for path in paths if self._files.is_empty_overlay(path))

    def is_empty(self, layer: Layer) -> bool:
        """Return whether a layer is empty: a raw or qcow2 image without a backing file that contains no data, or a
        block device with neither a partition table nor a file system. `locate` must have found the file of the
        layer."""
        if layer.file is not None and layer.file.kind == "device":
            return self._files.is_blank_device(layer.path)
        if layer.format == "qcow2":
            return self._files.is_empty_overlay(layer.path)
        return self._files.is_hole(layer.path, layer.offset, layer.size)

    def _record(self, devices: tuple[BlockDevice, ...], generation: Callable[[str], Generation | None]) -> DiskRecord:
        def located(layer: Layer) -> Layer:
            file = self._files.get(layer.path)
            if file is not None:
                file = replace(file, generation=generation(layer.path))
            return replace(layer, driver=self._drivers.get(layer.path, ""), file=file)

        found = tuple(replace(device, layers=tuple(map(located, device.layers))) for device in devices)
        return DiskRecord(host=self._host, devices=found + self._tpms)


def _settled(record: DiskRecord) -> Iterator[bool]:
    for device in record.devices:
        for layer in device.layers:
            if layer.generation is not None:
                yield layer.generation.settled
