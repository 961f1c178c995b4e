"""Description of a running QEMU: its version, machine, CPU, number of vCPUs, devices and block devices."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Any, Self, TypeVar

from pageferry.errors import WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu import block_devices, generation_id, ram
from pageferry.workloads.qemu.block_devices import BlockDevice
from pageferry.workloads.qemu.cpu import Cpu

log = getLogger(__name__)

M = TypeVar("M")

MAX_SHOWN = 1000
"""Maximum number of characters that an error message quotes from the description of a peer."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Machine of a guest, as reported by its monitor."""

    qemu_version: str
    type: str
    vcpu_threads: tuple[int, ...]
    """Thread ids of the vCPUs, in QEMU's PID namespace: see `proc.inner_threads`."""
    devices: tuple[tuple[str, str], ...]
    """Type and id of each device that the user has added."""
    cpu: Cpu
    block_devices: tuple[BlockDevice, ...] | None = None
    """Disks and drives, without the files behind them (see `Storage`); None before they are queried."""
    generation_id: str | None = None
    """GUID of the guest; None without the device `vmgenid`."""

    @classmethod
    async def ask(cls, monitor: Monitor) -> Self:
        """Read the description of the machine from the monitor. Raises WorkloadError, WorkloadDied."""
        kind, cpus, devices = await asyncio.gather(
            monitor.execute("qom-get", path="/machine", property="type"),
            monitor.execute("query-cpus-fast"),
            ram.devices(monitor),
        )
        threads = tuple(cpu["thread-id"] for cpu in cpus)
        cpu = await Cpu.ask(monitor, [one["qom-path"] for one in cpus])
        guid = await generation_id.query(monitor, devices)
        machine = cls(monitor.qemu_version, kind.removesuffix("-machine"), threads, tuple(sorted(devices)), cpu)
        return replace(machine, generation_id=guid)

    async def again(self, monitor: Monitor, *, media: bool = False) -> Self:
        """Return the description with current vCPUs and devices, which other clients can add and remove.

        `media`: query known block devices too. Otherwise, they are queried only if devices have been added or removed:
        each query prolongs a pause.
        """
        cpus, found, changed = await asyncio.gather(
            monitor.execute("query-cpus-fast"),
            ram.devices(monitor),
            self.with_media(monitor) if media else _unchanged(self),
        )
        threads, devices = tuple(cpu["thread-id"] for cpu in cpus), tuple(sorted(found))
        if devices != self.devices and self.block_devices is not None:
            changed = await self.with_all_media(monitor)
        return replace(changed, vcpu_threads=threads, devices=devices)

    async def with_media(self, monitor: Monitor) -> Self:
        """Return the description with current block devices. A guest without block devices has none until a device is
        added, and is not queried."""
        return await self.with_all_media(monitor) if self.block_devices else self

    async def with_all_media(self, monitor: Monitor) -> Self:
        """Return the description with current block devices, even if none is known so far."""
        return replace(self, block_devices=block_devices.parse(await monitor.execute("query-block")))

    async def added(self, monitor: Monitor) -> list[str]:
        """Return descriptions of the devices that QEMU has, but that this description lacks. Raises WorkloadError."""
        found = sorted(set(await ram.devices(monitor)) - set(self.devices))
        return [f"{name} ({kind})" for kind, name in found]

    def check_unchanged(self, now: Self, name: str) -> None:
        """Raise WorkloadError if the machine of `name` has changed to `now`."""
        if now != self:
            raise WorkloadError(
                f"cannot use {name}: it was reconfigured during the operation ({self._described}, now "
                f"{now._described}); do not add or remove devices, disks or vCPUs until the operation has finished"
            )

    @property
    def _described(self) -> str:
        devices = ", ".join(f"{kind} {name}" for kind, name in self.devices)
        disks = ", ".join(
            f"{disk.shown} {' over '.join(layer.path for layer in disk.layers)}" for disk in self.block_devices or ()
        )
        return f"-smp {len(self.vcpu_threads)} -device {devices or 'none'}, disks {disks or 'none'}"

    @property
    def _device_types(self) -> str:
        return ", ".join(kind for kind, _ in self.devices)

    @property
    def details(self) -> dict[str, Any]:
        """Details for the peer of a migration, and for an image: `qemu` (its version), `machine` (type with version),
        `cpus`, `devices`, `generation-id` if the guest has one, and those of the CPU.
        """
        guid = {generation_id.DETAIL: self.generation_id} if self.generation_id is not None else {}
        return {
            "qemu": self.qemu_version,
            "machine": self.type,
            "cpus": len(self.vcpu_threads),
            "devices": self._device_types,
            **guid,
            **self.cpu.details,
        }

    def check_source(self, details: Mapping[str, Any], source: str, here: str) -> None:
        """Raise WorkloadError, with the reason, if a guest with these details cannot run on this machine. `source` and
        `here`: names of the guest and of this machine, for the error message.

        QEMU itself checks less: it loads a state that lacks some of the devices of the machine, and does not compare
        CPUs.
        """
        for theirs, ours in self._differences(details):
            raise WorkloadError(
                f"the machines do not match: {source} has {theirs}, {here} has {ours}; start the destination with the "
                "options of the source"
            )
        if "cpu-features" not in details:
            log.warning("%s does not report its CPU model; start %s with the same -cpu", source, here)

    def _differences(self, details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        ours = self.details
        for detail, option in (("machine", "-machine"), ("cpus", "-smp"), ("devices", "-device")):
            if detail in details and details[detail] != ours[detail]:
                yield f"{option} {str(details[detail])[:MAX_SHOWN] or 'none'}", str(ours[detail] or "none")
        if (cpu := self.cpu.mismatch(details)) is not None:
            yield cpu


async def _unchanged(machine: M) -> M:
    return machine
