"""Start and adoption of QEMU guests: from a command line, or through the monitor of a running QEMU."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pageferry.errors import UnsupportedError, UsageError, WorkloadDied
from pageferry.host import memory_file
from pageferry.host.endings import LOG
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Folder, QemuEntry, identify
from pageferry.memory import mappers
from pageferry.workloads.qemu import (
    addresses,
    command_line,
    disk_arguments,
    frozen_files,
    libvirt,
    opening,
    placeholders,
    process,
    ram,
    run_state,
    unsupported,
)
from pageferry.workloads.qemu.libvirt import Domain
from pageferry.workloads.qemu.machine import Machine
from pageferry.workloads.qemu.opening import Opened
from pageferry.workloads.qemu.process import QemuProcess

_NO_PREALLOC = "remove -mem-prealloc and prealloc=on"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """Options of `QemuWorkload.start`."""

    incoming: bool = False
    """Whether the guest waits, paused, for `load_state`."""
    at_once: bool = False
    """Whether to keep the monitor open, because `load_state` is called soon."""
    detach: bool = True
    """Whether QEMU runs in a separate session, with its output in the log of the workload. Otherwise it uses the
    terminal of this process."""
    hugetlb: bool = False
    """Whether the memory is on hugetlbfs."""
    clone: bool = False
    """Whether the memory will be replaced by private pages over a base."""


class StartArguments(TypedDict, total=False):
    """Keyword arguments for the fields of `StartOptions`."""

    incoming: bool
    at_once: bool
    detach: bool
    hugetlb: bool
    clone: bool


@contextlib.contextmanager
def released_on_error(folder: Folder) -> Iterator[None]:
    """Release the name if the block, which starts or adopts the guest, raises an exception."""
    try:
        yield
    except BaseException:
        folder.release()
        raise


def parse(name: str, arguments: Sequence[str], options: StartOptions) -> command_line.CommandLine:
    """Parse the command line of QEMU, in which `{name}` stands for the name of the guest, and log warnings.

    Raises UsageError, also if QEMU would write to a frozen disk, UnsupportedError, and AddressInUse if QEMU could not
    listen on an address in the command line.
    """
    command = command_line.parse(placeholders.fill(arguments, {placeholders.NAME: name}))
    addresses.refuse_used(name, command.arguments)
    for path in disk_arguments.written_files(command.arguments):
        frozen_files.check_writable(path, name)
    for warning in command.warnings:
        log.warning("%s", warning)
    if options.clone and command.preallocates:
        raise UnsupportedError(
            f"cannot share the memory of the image with {name}: QEMU allocates all of its memory; {_NO_PREALLOC}, or "
            "restore the guest with `--memory own`"
        )
    if options.at_once and command.preallocates:
        log.warning("%s: preallocation only delays QEMU when a guest is restored: %s", name, _NO_PREALLOC)
    return command


def launch(folder: Folder, command: command_line.CommandLine, options: StartOptions) -> tuple[QemuProcess, str]:
    """Start QEMU with a memory file, and register it at once, so that QEMU can be found if this process is killed.

    Return the process and the path of its monitor. Raises UsageError, WorkloadError.
    """
    qmp_socket = folder.socket_path("qmp.sock")
    if options.hugetlb and not command.needs_ram_file:
        raise UsageError(
            "`hugetlb` cannot be combined with a memory backend on the command line: it applies to memory that "
            "pageferry adds; remove one of them"
        )
    for used in command.ram_files:
        mappers.refuse_in_use(folder.name, *used)
    file = None
    try:
        if command.needs_ram_file:
            file = memory_file.create_ram_file(command.ram_size, hugetlb=options.hugetlb)
            if file.warning:
                log.warning("%s", file.warning)
        path = file.inherited_path if file is not None else None
        words = command.managed(
            ram_path=path,
            qmp_socket=qmp_socket,
            incoming=options.incoming,
            console=_console(folder, command) if options.detach else None,
        )
        descriptors = [file.fd] if file is not None else []
        child = process.launch(words, descriptors, folder.path / LOG if options.detach else None)
    finally:
        if file is not None:
            os.close(file.fd)
    with contextlib.suppress(WorkloadDied):  # the caller waits for the monitor, and reports why QEMU has exited
        folder.publish(_entry(child.pid, qmp_socket, adopted=False))
    return child, qmp_socket


def _console(folder: Folder, command: command_line.CommandLine) -> str | None:
    """Return the path of the socket of a console to add; None if the command line uses the serial port.

    A script that starts QEMU can add options, such as -nodefaults. With these, a detached guest would have
    another machine than its destination in the foreground.
    """
    if not command.has_free_serial or not process.is_binary(command.arguments[0]):
        return None
    return folder.socket_path("tty.sock")


async def register(
    folder: Folder, qmp_socket: str, child: QemuProcess | None = None, expected: Domain | None = None
) -> Opened:
    """Check the QEMU that serves a monitor, and register it. `expected`: domain of libvirt that the monitor must belong
    to. Raises UnsupportedError, WorkloadError."""
    connecting = child.monitor(qmp_socket) if child is not None else Monitor.open(qmp_socket)
    async with await connecting as monitor:
        if expected is not None:
            await libvirt.check_domain(monitor, expected)
        pid, machine = await opening.pid_of(monitor), await Machine.ask(monitor)
        domain = await libvirt.domain_of(monitor) if child is None else None
        await unsupported.refuse_running(monitor)
        machine = await machine.with_all_media(monitor)
        ran = await run_state.runs(monitor)
        regions = await opening.regions_of(monitor, pid)
    for region in regions:
        if ram.misaligned(region):
            log.warning("%s: huge pages are disabled; start QEMU with align=2M for this memory", region.name)
    entry = _entry(pid, qmp_socket, adopted=child is None, domain=domain)
    folder.publish(entry)
    return Opened(folder, entry, machine, regions, ran, child)


def _entry(pid: int, qmp_socket: str, *, adopted: bool, domain: str | None = None) -> QemuEntry:
    return QemuEntry(**identify(pid), qmp_socket=qmp_socket, adopted=adopted, domain=domain)
