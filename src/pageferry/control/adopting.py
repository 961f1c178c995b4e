"""Adoption of guests that another program has started: QEMU with a QMP socket, or a domain of libvirt."""

from __future__ import annotations

from typing import Unpack

from pageferry import values
from pageferry.control.options import AdoptArguments, AdoptOptions
from pageferry.errors import UsageError
from pageferry.host.blocking import synchronous
from pageferry.host.registry import check_name
from pageferry.workloads.events import WorkloadInfo
from pageferry.workloads.inventory import describe
from pageferry.workloads.qemu import libvirt
from pageferry.workloads.qemu.guest import QemuWorkload


async def adopt_async(name: str | None = None, **options: Unpack[AdoptArguments]) -> WorkloadInfo:
    """Register a running QEMU guest that was not started by pageferry, and return its description.

    `options` are the fields of `pageferry.control.options.AdoptOptions`: qmp, libvirt, connect. `name`: name of the
    guest on this host; if None, the name of the domain of libvirt.

    Raises UsageError, NameInUse, WorkloadError, and NoSuchWorkload if libvirt has no such domain. Raises
    UnsupportedError if the guest lacks options of QEMU or elements of its XML, which the message names.

    Examples:
        >>> import subprocess, time
        >>> from pathlib import Path
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none", "-qmp", "unix:web.qmp,server=on,wait=off"]
        >>> qemu += ["-object", "memory-backend-file,id=ram,size=64M,mem-path=/dev/shm/web.ram,share=on,align=2M"]
        >>> program = subprocess.Popen([*qemu, "-machine", "memory-backend=ram"])
        >>> while not Path("web.qmp").exists():
        ...     time.sleep(0.1)
        >>> info = pageferry.adopt("web", qmp="web.qmp")
        >>> print(info.name, info.status)
        web running
        >>> pageferry.stop("web")
        >>> program.wait()
        0
        >>> Path("/dev/shm/web.ram").unlink()
    """
    chosen = values.options(AdoptOptions, options)
    if name is not None:
        check_name(name)
    if chosen.qmp is not None:
        if name is None:
            raise UsageError("cannot adopt a guest without a name: give the name for the guest on this host")
        workload = await QemuWorkload.adopt(name, chosen.qmp)
    else:
        assert chosen.libvirt is not None
        domain = await libvirt.find(chosen.libvirt, chosen.connect)
        workload = await QemuWorkload.adopt(name or domain.name, domain.qmp_socket, domain=domain)
    try:
        return await describe(workload)
    finally:
        workload.close()


adopt = synchronous(adopt_async)
