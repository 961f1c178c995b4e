"""`pageferry stop`: end a workload."""

from __future__ import annotations

import argparse
import asyncio
import signal

from pageferry.errors import NoSuchWorkload, WorkloadDied, WorkloadError
from pageferry.host import processes
from pageferry.host.registry import AnyEntry, Claim, QemuEntry, Registry
from pageferry.workloads.qemu import QemuWorkload

TIMEOUT = 10.0
"""Seconds for a program to end."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Name, and how."""
    parser.description = (
        "End a workload: a QEMU guest by `quit`, as if its power was cut; the program of an arena by SIGTERM."
    )
    parser.add_argument("name", metavar="NAME", help="the workload, as `pageferry list` shows it")
    parser.add_argument("--kill", action="store_true", help="by SIGKILL, without asking: for one that does not answer")


async def run(args: argparse.Namespace) -> int:
    """End the workload and forget it."""
    registry = Registry()
    entry = registry.lookup(args.name)
    if isinstance(entry, Claim):
        raise NoSuchWorkload(f"{args.name} is still being started by process {entry.pid}: end that, or wait")
    if isinstance(entry, QemuEntry) and not args.kill:
        await _quit(args.name, entry, registry)
    else:
        await _signal(args.name, entry, signal.SIGKILL if args.kill else signal.SIGTERM)
        registry.remove(args.name)
    return 0


async def _quit(name: str, entry: QemuEntry, registry: Registry) -> None:
    """End a guest by `quit`. Raises WorkloadError, which names --kill, where it does not answer or end."""
    try:
        guest = await QemuWorkload.attach(name, registry=registry)
    except WorkloadDied:
        raise
    except WorkloadError as hangs:
        raise WorkloadError(f"{hangs}. `pageferry stop --kill {name}` ends it without asking") from hangs
    if not await guest.quit(TIMEOUT):
        guest.close()
        raise WorkloadError(
            f"{name} (process {entry.pid}) does not quit: `pageferry stop --kill {name}` ends it without asking"
        )
    await guest.forget()


async def _signal(name: str, entry: AnyEntry, number: signal.Signals) -> None:
    processes.send_signal(entry.pid, entry.started, number)
    try:
        async with asyncio.timeout(TIMEOUT):
            await processes.wait_for_end(entry.pid, entry.started)
    except TimeoutError as slow:
        raise WorkloadError(
            f"{name} (process {entry.pid}) has not ended {TIMEOUT:g} s after {number.name}: "
            f"`pageferry stop --kill {name}` ends it"
        ) from slow
