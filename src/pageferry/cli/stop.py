"""`pageferry stop`: stop a workload."""

from __future__ import annotations

import argparse
import asyncio
import signal

from pageferry.errors import NoSuchWorkload, WorkloadDied, WorkloadError
from pageferry.host import processes
from pageferry.host.registry import AnyEntry, Claim, QemuEntry, Registry
from pageferry.workloads.qemu.guest import QemuWorkload

TIMEOUT = 10.0
"""Seconds to wait for a program to exit."""


async def run(args: argparse.Namespace) -> int:
    """Stop the workload, and remove its entry from the registry."""
    registry = Registry()
    entry = registry.lookup(args.name)
    if isinstance(entry, Claim):
        raise NoSuchWorkload(
            f"cannot stop {args.name}: process {entry.pid} is still starting it; wait, or terminate that process"
        )
    if isinstance(entry, QemuEntry) and not args.kill:
        await _quit(args.name, entry, registry)
    else:
        await _signal(args.name, entry, signal.SIGKILL if args.kill else signal.SIGTERM)
        registry.remove(args.name)
    return 0


async def _quit(name: str, entry: QemuEntry, registry: Registry) -> None:
    """Stop a guest with QMP `quit`. Raises WorkloadError if the guest does not respond or does not exit; the message
    suggests --kill."""
    try:
        guest = await QemuWorkload.attach(name, registry=registry)
    except WorkloadDied:
        raise
    except WorkloadError as error:
        raise WorkloadError(f"{error}; to send SIGKILL, run `pageferry stop --kill {name}`") from error
    if not await guest.quit(TIMEOUT):
        guest.close()
        raise WorkloadError(
            f"cannot stop {name}: process {entry.pid} has not exited {TIMEOUT:g} s after `quit`; to send SIGKILL, run "
            f"`pageferry stop --kill {name}`"
        )
    await guest.forget()


async def _signal(name: str, entry: AnyEntry, number: signal.Signals) -> None:
    processes.send_signal(entry.pid, entry.started, number)
    try:
        async with asyncio.timeout(TIMEOUT):
            await processes.wait_for_end(entry.pid, entry.started)
    except TimeoutError as slow:
        raise WorkloadError(
            f"cannot stop {name}: process {entry.pid} has not exited {TIMEOUT:g} s after {number.name}; to send "
            f"SIGKILL, run `pageferry stop --kill {name}`"
        ) from slow
