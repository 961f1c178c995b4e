"""QEMU guests that libvirt manages: a domain is found by the program `virsh`, and recognised by its monitor.

libvirt keeps its QMP session open, so its monitor serves no other client. A domain can be adopted if its XML gives QEMU
a second QMP socket (`<qemu:commandline>`). This socket is QEMU's own: its listener identifies the process, it accepts
descriptors, and a guardian can use it after this process, or libvirt, has exited. `virsh qemu-monitor-command` has none
of these properties, and sends each command of a pause through the daemon.

`virsh` is used instead of the bindings of libvirt: they are a library in C that must match the installed libvirt, and
only one call is needed (`virsh dumpxml`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pageferry.errors import NoSuchWorkload, UnsupportedError, UsageError, WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu.option_syntax import ON, options, properties

VIRSH_TIMEOUT = 30.0
"""Maximum time for a reply of libvirt, seconds."""

GUIDE = "docs/guide/libvirt.md shows the whole domain"

_NAMESPACE = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_MONITOR = "charmonitor"
"""Label of the character device of libvirt's monitor, in all QEMU processes that libvirt starts."""
_ADD_SOCKET = (
    "add <qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:PATH,server=on,wait=off'/>"
    "</qemu:commandline> to its XML, and xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' to <domain>"
)


@dataclass(frozen=True, slots=True)
class Domain:
    """Running domain of libvirt."""

    name: str
    uuid: str
    qmp_socket: str
    """Path of the QMP socket that the XML of the domain adds."""


async def find(domain: str, connect: str | None = None) -> Domain:
    """Return the running domain with this name, id or UUID. `connect`: URI of libvirt; None for the default of `virsh`.

    Raises NoSuchWorkload if libvirt has no such domain, UnsupportedError if there is no `virsh`, or if the XML adds no
    QMP socket (the error message contains the XML to add), and WorkloadError if the domain is not running, or if
    libvirt does not reply.
    """
    from xml.etree import ElementTree  # 8 modules, which other verbs do not need

    root = ElementTree.fromstring(await _dump(domain, connect))
    name, uuid = root.findtext("name") or domain, root.findtext("uuid") or ""
    if root.get("id") is None:
        raise WorkloadError(f"cannot adopt domain {name}: it is not running; start it with `virsh start {name}`")
    path = next(_qmp_sockets([item.get("value", "") for item in root.iter(f"{_NAMESPACE}arg")]), None)
    if path is None:
        raise UnsupportedError(
            f"cannot adopt domain {name}: it has no QMP socket besides libvirt's, which serves no other client; "
            f"{_ADD_SOCKET}, and start the domain again ({GUIDE})"
        )
    return Domain(name, uuid, path)


async def check_domain(monitor: Monitor, domain: Domain) -> None:
    """Raise WorkloadError unless this is the monitor of the domain: another program may have replaced the socket."""
    found = (await monitor.execute("query-uuid"))["UUID"]
    if found != domain.uuid:
        raise WorkloadError(
            f"cannot adopt domain {domain.name}: {monitor.path} belongs to the guest {found}, not to {domain.uuid}; "
            "give each domain a separate socket"
        )


async def domain_of(monitor: Monitor) -> str | None:
    """Return the name of the domain if libvirt manages the guest of a monitor, otherwise None."""
    if any(device["label"] == _MONITOR for device in await monitor.execute("query-chardev")):
        return str((await monitor.execute("query-name")).get("name", ""))
    return None


def refuse_migration(name: str, domain: str) -> None:
    """Raise UnsupportedError: libvirt would report a domain that has moved as shut off, and could start it again."""
    raise UnsupportedError(
        f"cannot migrate {name}: libvirt manages it as domain {domain}, and would not know that it runs at the "
        f"destination; use `virsh migrate`, or save it with `pageferry checkpoint`, end it with `virsh destroy "
        f"{domain}`, and restore it there"
    )


async def _dump(domain: str, connect: str | None) -> str:
    """Return the current XML of a domain. Raises UnsupportedError, NoSuchWorkload, WorkloadError."""
    if (virsh := shutil.which("virsh")) is None:
        raise UnsupportedError(
            "cannot query libvirt: there is no virsh in PATH; install libvirt-clients, or give the socket with `qmp`"
        )
    uri = ("--connect", connect) if connect is not None else ()
    process = await asyncio.create_subprocess_exec(
        *(virsh, *uri, "dumpxml", "--domain", domain),
        env={**os.environ, "LC_ALL": "C"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(VIRSH_TIMEOUT):
            output, said = await process.communicate()
    except TimeoutError as late:
        raise WorkloadError(f"cannot query libvirt: no reply within {VIRSH_TIMEOUT:g} s; check its daemon") from late
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == 0:
        return output.decode()
    message = " ".join(line.removeprefix("error: ") for line in said.decode(errors="replace").split("\n") if line)
    if message.startswith("failed to get domain"):
        raise NoSuchWorkload(f"no domain {domain} in libvirt ({message}); see `virsh list --all`")
    raise WorkloadError(
        f"cannot query libvirt for domain {domain}: {message}; check its daemon, and the URI (`connect`)"
    )


def _qmp_sockets(words: Sequence[str]) -> Iterator[str]:
    """Yield the paths of the QMP sockets on which QEMU listens with these additional options."""
    try:
        given = list(options(["qemu-system-x86_64", *words]))
    except UsageError:
        return  # options that QEMU may accept, but that cannot be parsed
    devices = {
        one["id"]: one for name, value in given if name == "chardev" and "id" in (one := properties(value, "backend"))
    }
    for name, value in given:
        if name in ("qmp", "qmp-pretty"):
            kind, _, rest = value.partition(":")
            if kind == "unix":
                yield from _listening(properties(rest, "path"))
            elif kind == "chardev":
                yield from _listening(devices.get(rest, {}))
        elif name == "mon" and (monitor := properties(value, "chardev")).get("mode") == "control":
            yield from _listening(devices.get(monitor.get("chardev", ""), {}))


def _listening(device: dict[str, str]) -> Iterator[str]:
    if "path" in device and device.get("server") in ON:
        yield device["path"]
