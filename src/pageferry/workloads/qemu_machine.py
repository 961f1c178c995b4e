"""What a running QEMU is: its version, machine, vCPUs and devices, which do not change while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pageferry.errors import WorkloadError
from pageferry.workloads import qemu_ram
from pageferry.workloads.qmp import Monitor


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine of a guest, as its monitor tells."""

    qemu_version: str
    type: str
    vcpu_threads: tuple[int, ...]
    devices: tuple[str, ...]
    """Types of those that the user has added."""

    @classmethod
    async def ask(cls, monitor: Monitor) -> Self:
        """QMP `qom-get`, `query-cpus-fast` and `qom-list`."""
        kind = await monitor.execute("qom-get", path="/machine", property="type")
        cpus = await monitor.execute("query-cpus-fast")
        threads = tuple(cpu["thread-id"] for cpu in cpus)
        devices = tuple(sorted(await qemu_ram.devices(monitor)))
        return cls(monitor.qemu_version, kind.removesuffix("-machine"), threads, devices)

    @property
    def details(self) -> dict[str, Any]:
        """For the other side of a migration: `qemu` (its version), `machine` (type with version), `cpus`, `devices`."""
        return {
            "qemu": self.qemu_version,
            "machine": self.type,
            "cpus": len(self.vcpu_threads),
            "devices": ", ".join(self.devices),
        }

    def check_source(self, name: str, theirs: Mapping[str, Any]) -> None:
        """Raises WorkloadError where a guest with these details cannot be received by `name`, saying why.

        QEMU itself notices less: it takes a state that lacks some of its devices, and the guest never learns of them.
        """
        ours = self.details
        for detail, option in (("machine", "-machine"), ("cpus", "-smp"), ("devices", "-device")):
            if detail in theirs and theirs[detail] != ours[detail]:
                raise WorkloadError(
                    f"the source has {option} {theirs[detail] or 'none'}, {name} at the destination has "
                    f"{ours[detail] or 'none'}: start it with the same"
                )
