"""Devices, back ends and block drivers of QEMU with which a guest cannot be managed.

Most of them cause writes to guest memory that bypass the page tables of the QEMU process: by a device of the host
through pinned pages, or by another process through a separate mapping. No write trace (S2) records such writes. The
names are those of QEMU 7.2 to 11.1. A command line is checked before QEMU starts. A running QEMU is queried too,
because devices can be added at any time, and the file of a disk can specify further drivers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping

from pageferry.errors import UnsupportedError
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu.option_syntax import ON

HOST_DEVICE = "a device of the host writes to guest memory without a trace"
OTHER_PROCESS = "another process writes to guest memory without a trace"
KERNEL_TARGET = "the kernel writes to guest memory through pinned pages, without a trace"
HOTPLUG = "hotplugged memory is not managed: give all memory with -m"
PERSISTENT = "persistent memory is not managed: use a virtio-blk or virtio-scsi disk"
CONFIDENTIAL = "the memory of a confidential guest cannot be read from outside"

DEVICES = {
    "vfio-": HOST_DEVICE,  # also vfio-user-pci of 10.1, whose device is another process
    "x-vfio-user-": OTHER_PROCESS,
    "vhost-user-": OTHER_PROCESS,
    "vhost-vdpa-": HOST_DEVICE,
    "vhost-scsi": KERNEL_TARGET,
    "x-pci-proxy-dev": OTHER_PROCESS,
    "pvrdma": HOST_DEVICE,
    "ivshmem": "its memory is shared with other processes and not managed",
    "cxl-type3": "memory of a CXL device is not managed: give all memory with -m",
    "pc-dimm": HOTPLUG,
    "nvdimm": PERSISTENT,
    "virtio-mem": HOTPLUG,
    "virtio-pmem": PERSISTENT,
}
"""Devices, by prefix of the type (`-device`)."""

NETWORKS = {"vhost-user": OTHER_PROCESS, "vhost-vdpa": HOST_DEVICE}
"""Network back ends, by type (`-netdev`, `-nic`)."""

BLOCK_DRIVERS = {
    "nvme": HOST_DEVICE,
    "nvme-io_uring": HOST_DEVICE,
    "virtio-blk-vfio-pci": HOST_DEVICE,
    "virtio-blk-vhost-user": OTHER_PROCESS,
    "virtio-blk-vhost-vdpa": HOST_DEVICE,
}
"""Block drivers, by name (`-blockdev`, `-drive`); the last four are those of libblkio."""

OBJECTS = {
    "cryptodev-vhost-user": OTHER_PROCESS,
    "vhost-user-backend": OTHER_PROCESS,
    "x-remote-object": OTHER_PROCESS,
    "x-vfio-user-server": OTHER_PROCESS,
    "sev-": CONFIDENTIAL,
    "tdx-guest": CONFIDENTIAL,
}
"""Objects, by prefix of the type (`-object`)."""

_NETWORK = re.compile(r"\btype=([\w-]+)")


def refuse_device(driver: str) -> None:
    """Raise UnsupportedError if a guest with this type of device cannot be managed."""
    _refuse(f"device {driver}", driver, DEVICES)


def refuse_network(properties: Mapping[str, str]) -> None:
    """Raise UnsupportedError if a guest with this network back end cannot be managed."""
    kind = properties.get("type", "")
    if kind in NETWORKS:
        raise UnsupportedError(f"unsupported network {kind}: {NETWORKS[kind]}")
    if kind == "passt" and properties.get("vhost-user") in ON:
        raise UnsupportedError(f"unsupported network {kind},vhost-user=on: {OTHER_PROCESS}")


def refuse_object(kind: str) -> None:
    """Raise UnsupportedError if a guest with this type of object cannot be managed."""
    _refuse(f"object {kind}", kind, OBJECTS)


def refuse_block(properties: Iterable[tuple[str, str]]) -> None:
    """Raise UnsupportedError if a guest with this disk cannot be managed. `properties`: flat properties of the disk."""
    for key, value in properties:
        named = value if key.rpartition(".")[2] in ("driver", "format") else ""
        if value.startswith("nvme:"):
            named = "nvme"
        if named in BLOCK_DRIVERS:
            raise UnsupportedError(f"unsupported block driver {named}: {BLOCK_DRIVERS[named]}")


async def refuse_running(monitor: Monitor) -> None:
    """Raise UnsupportedError if a running QEMU has any unsupported device, object, network back end or block driver."""
    devices, more_devices, objects, networks, nodes = await asyncio.gather(
        _types(monitor, "/machine/peripheral"),
        _types(monitor, "/machine/peripheral-anon"),
        _types(monitor, "/objects"),
        # QMP has no command that returns the network back ends.
        monitor.execute("human-monitor-command", command_line="info network"),
        monitor.execute("query-named-block-nodes", flat=True),
    )
    for kind in (*devices, *more_devices):
        refuse_device(kind)
    for kind in objects:
        refuse_object(kind)
    for kind in _NETWORK.findall(networks):
        refuse_network({"type": kind})
    refuse_block(("driver", node["drv"]) for node in nodes)


async def _types(monitor: Monitor, folder: str) -> list[str]:
    items = [item["type"] for item in await monitor.execute("qom-list", path=folder)]
    return [kind.removeprefix("child<").removesuffix(">") for kind in items if kind.startswith("child<")]


def _refuse(what: str, kind: str, reasons: Mapping[str, str]) -> None:
    for beginning, reason in reasons.items():
        if kind.startswith(beginning):
            raise UnsupportedError(f"unsupported {what}: {reason}")
