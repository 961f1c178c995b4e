"""Stopping of workloads, without the cooperation of the guest or the program."""

from __future__ import annotations

import asyncio
import signal

from pageferry import values
from pageferry.errors import NoSuchWorkload, WorkloadDied, WorkloadError
from pageferry.host import endings, processes
from pageferry.host.blocking import synchronous
from pageferry.host.registry import AnyEntry, Claim, QemuEntry, Registry
from pageferry.workloads.qemu.guest import QemuWorkload

STOP_TIMEOUT = 10.0
"""Seconds to wait for a program to exit."""


async def stop_async(name: str, *, kill: bool = False) -> None:
    """Stop a workload, and remove its entry: a guest by QMP `quit`, which acts like a power cut, and the program of an
    arena by SIGTERM. `kill`: send SIGKILL instead.

    Raises NoSuchWorkload, WorkloadDied, and WorkloadError if the workload does not exit.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> pageferry.stop("web")
    """
    values.flag("kill", kill)
    registry = Registry()
    entry = registry.lookup(name)
    if isinstance(entry, Claim):
        raise NoSuchWorkload(
            f"cannot stop {name}: process {entry.pid} is still starting it; wait, or terminate that process"
        )
    if isinstance(entry, QemuEntry) and not kill:
        await _quit(name, entry, registry)
    else:
        await _signal(name, entry, signal.SIGKILL if kill else signal.SIGTERM)
        registry.remove(name, endings.now(name, entry.kind, entry.pid, "stopped", exact=True))


stop = synchronous(stop_async)


async def _quit(name: str, entry: QemuEntry, registry: Registry) -> None:
    """Stop a guest with QMP `quit`. Raises WorkloadError if the guest does not respond or does not exit; the message
    suggests --kill."""
    try:
        guest = await QemuWorkload.attach(name, registry=registry)
    except WorkloadDied:
        raise
    except WorkloadError as error:
        raise WorkloadError(f"{error}; to send SIGKILL, run `pageferry stop --kill {name}`") from error
    if not await guest.quit(STOP_TIMEOUT):
        guest.close()
        raise WorkloadError(
            f"cannot stop {name}: process {entry.pid} has not exited {STOP_TIMEOUT:g} s after `quit`; to send SIGKILL, "
            f"run `pageferry stop --kill {name}`"
        )
    await guest.forget("stopped")


async def _signal(name: str, entry: AnyEntry, number: signal.Signals) -> None:
    processes.send_signal(entry.pid, entry.started, number)
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await processes.wait_for_end(entry.pid, entry.started)
    except TimeoutError as slow:
        raise WorkloadError(
            f"cannot stop {name}: process {entry.pid} has not exited {STOP_TIMEOUT:g} s after {number.name}; to send "
            f"SIGKILL, run `pageferry stop --kill {name}`"
        ) from slow
