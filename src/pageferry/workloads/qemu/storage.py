"""Disks of one guest: the record for the peer of a migration and for images (see `block_devices`)."""

from __future__ import annotations

import asyncio
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
    """Record of devices in a pause."""

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
        """Record that `note` has made; None if the guest had no devices."""

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
        """Return the record of these devices, without generations, as a detail of the guest; no detail if the guest has
        no such devices."""
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
        """Like `record`, with the current generation of each file."""
        return self._record(devices, self._files.generation)

    async def note(self, devices: tuple[BlockDevice, ...], *, at_rest: bool) -> None:
        """Note the record of these devices, with the current generation of each file, in `noted`.

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

    def empty_overlays(self, devices: tuple[BlockDevice, ...]) -> frozenset[str]:
        """Return the paths of overlays that contain no data."""
        paths = [layer.path for device in devices for layer in device.layers[:-1]]
        return frozenset(path for path in paths if self._files.is_empty_overlay(path))

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
