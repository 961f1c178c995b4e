"""Opening of QEMU guests: they are started from a command line, adopted through their monitor, or found by their
name."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pageferry.errors import NoSuchWorkload, UsageError, WorkloadDied, WorkloadError
from pageferry.host import memory_file, qmp_peer
from pageferry.host.blocking import in_thread
from pageferry.host.endings import LOG
from pageferry.host.qmp import Monitor
from pageferry.host.registry import Folder, QemuEntry, Registry, identify
from pageferry.memory.regions import Region
from pageferry.workloads.qemu import command_line, process, ram, run_state, unsupported
from pageferry.workloads.qemu.machine import Machine
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


class StartArguments(TypedDict, total=False):
    """Keyword arguments for the fields of `StartOptions`."""

    incoming: bool
    at_once: bool
    detach: bool
    hugetlb: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """Opened guest, with its process, machine and memory."""

    folder: Folder
    entry: QemuEntry
    machine: Machine
    regions: tuple[Region, ...]
    ran: bool
    """Whether the guest ran when it was opened."""
    child: QemuProcess | None = None
    """Process of QEMU if this process has started it; None otherwise."""


@contextlib.contextmanager
def released_on_error(folder: Folder) -> Iterator[None]:
    """Release the name if the block, which starts or adopts the guest, raises an exception."""
    try:
        yield
    except BaseException:
        folder.release()
        raise


def parse(name: str, arguments: Sequence[str], options: StartOptions) -> command_line.CommandLine:
    """Parse the command line of QEMU, and log warnings. Raises UsageError, UnsupportedError."""
    command = command_line.parse(arguments)
    for warning in command.warnings:
        log.warning("%s", warning)
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
            "`hugetlb` applies to memory that pageferry adds, and the command line has a memory backend; remove one "
            "of them"
        )
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

    A script that starts QEMU can have options of its own, such as -nodefaults. With these, a detached guest would have
    another machine than its destination in the foreground.
    """
    if not command.has_free_serial or not process.is_binary(command.arguments[0]):
        return None
    return folder.socket_path("tty.sock")


async def register(folder: Folder, qmp_socket: str, child: QemuProcess | None) -> Opened:
    """Check the QEMU that serves a monitor, and register it. Raises UnsupportedError, WorkloadError."""
    opening = child.monitor(qmp_socket) if child is not None else Monitor.open(qmp_socket)
    async with await opening as monitor:
        pid, machine = await _pid_of(monitor), await Machine.ask(monitor)
        await unsupported.refuse_running(monitor)
        machine = await machine.with_all_media(monitor)
        ran = await run_state.runs(monitor)
        regions = await _regions_of(monitor, pid)
    for region in regions:
        if ram.misaligned(region):
            log.warning("%s: huge pages are disabled; start QEMU with align=2M for this memory", region.name)
    entry = _entry(pid, qmp_socket, adopted=child is None)
    folder.publish(entry)
    return Opened(folder, entry, machine, regions, ran, child)


async def find(name: str, registry: Registry, timeout: float) -> Opened:
    """Open the registered guest with this name. Raises NoSuchWorkload, WorkloadError, WorkloadDied."""
    async with session(name, registry, timeout) as (folder, entry, monitor):
        machine = await Machine.ask(monitor)
        ran = await run_state.runs(monitor)
        regions = await _regions_of(monitor, entry.pid)
    return Opened(folder, entry, machine, regions, ran)


@contextlib.asynccontextmanager
async def session(name: str, registry: Registry, timeout: float) -> AsyncIterator[tuple[Folder, QemuEntry, Monitor]]:
    """Open a session of the monitor of the registered guest with this name, for the block.

    Raises NoSuchWorkload, WorkloadDied, and WorkloadError if another client has the monitor for `timeout` seconds, or
    another process serves its socket.
    """
    folder = registry.folder(name)
    entry = registry.lookup(name)
    if not isinstance(entry, QemuEntry):
        raise NoSuchWorkload(f"{name} is not a QEMU guest, or is still being started; see `pageferry list`")
    async with await Monitor.open(entry.qmp_socket, timeout=timeout) as monitor:
        if (pid := await _pid_of(monitor)) != entry.pid:
            raise WorkloadError(
                f"cannot attach to {name}: {entry.qmp_socket} is served by process {pid}, and the guest is "
                f"process {entry.pid}; end the process that has taken the socket"
            )
        yield folder, entry, monitor


def _entry(pid: int, qmp_socket: str, *, adopted: bool) -> QemuEntry:
    return QemuEntry(**identify(pid), qmp_socket=qmp_socket, adopted=adopted)


async def _pid_of(monitor: Monitor) -> int:
    """Return the process id of the QEMU that serves a monitor."""
    threads = [cpu["thread-id"] for cpu in await monitor.execute("query-cpus-fast")]
    return await in_thread(qmp_peer.find_process, monitor.peer, threads, monitor.path)


async def _regions_of(monitor: Monitor, pid: int) -> tuple[Region, ...]:
    try:
        return await ram.open_regions(monitor, pid)
    except PermissionError as denied:
        raise WorkloadError(
            f"cannot open the memory of process {pid}: {denied.strerror}; run pageferry as the user of that QEMU, "
            "or as root"
        ) from denied
