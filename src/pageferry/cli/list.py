"""`pageferry list`: list the workloads of this host."""

from __future__ import annotations

import argparse
import asyncio
import os

import msgspec

from pageferry import report
from pageferry.errors import NoSuchWorkload, RestoreError, WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.registry import AnyEntry, ArenaEntry, Folder, QemuEntry, Registry
from pageferry.memory.regions import Region
from pageferry.migration.ownership import committed
from pageferry.pager import client
from pageferry.report.reporter import open_reporter
from pageferry.workloads.events import Listing, WorkloadInfo
from pageferry.workloads.protocols import Condition, Migratable

TIMEOUT = 1.0
"""Seconds to wait for the monitor of a guest, which another command may be using."""


async def run(args: argparse.Namespace) -> int:
    """Query all workloads concurrently and print them."""
    queries = [_query(name, entry) for name, entry in Registry().entries().items()]
    found = [info for info in await asyncio.gather(*queries) if info is not None]
    with open_reporter(args.output, lambda: report.WorkloadsView()) as reporter:
        if args.output == "human":
            reporter.final(Listing(found))
        else:
            for info in found:
                reporter.event(info)
    return 0


async def _query(name: str, entry: AnyEntry) -> WorkloadInfo | None:
    """Return the description of a registered workload; None if it has ended."""
    if not entry.alive:
        return None if entry.liveness() is False else _unknown(name, entry)
    try:
        workload = await _open(name, entry)
    except (WorkloadDied, NoSuchWorkload):
        return None
    except WorkloadError:
        return await _with_deferred(_without_memory(name, entry, "busy"))
    try:
        return await _with_deferred(await describe(workload))
    except WorkloadDied:
        return None
    finally:
        workload.close()


def _unknown(name: str, entry: AnyEntry) -> WorkloadInfo:
    return _without_memory(name, entry, "unknown")


def _without_memory(name: str, entry: AnyEntry, status: str) -> WorkloadInfo:
    kind = "qemu" if isinstance(entry, QemuEntry) else "arena"
    return WorkloadInfo(name=name, kind=kind, pid=entry.pid, status=status, memory=None, resident=None)


async def _with_deferred(info: WorkloadInfo) -> WorkloadInfo:
    """Return the description with the deferred memory of the workload."""
    try:
        status = await in_thread(client.status, Folder(Registry(), info.name))
    except RestoreError as error:
        return msgspec.structs.replace(info, waiting=str(error))
    if status is None:
        return info
    return msgspec.structs.replace(info, deferred=status.deferred, waiting=status.waiting)


async def _open(name: str, entry: AnyEntry) -> Migratable:
    match entry:
        case QemuEntry():
            from pageferry.workloads.qemu.guest import QemuWorkload

            return await QemuWorkload.attach(name, timeout=TIMEOUT)
        case ArenaEntry(control_socket=path):
            from pageferry.workloads.arena.control_socket.client import RemoteArena

            return await RemoteArena.connect(path)
        case _:
            raise NoSuchWorkload(f"cannot open {name}: it is still being started; retry when it runs")


async def describe(workload: Migratable) -> WorkloadInfo:
    """Return the description of an open workload. Raises WorkloadDied."""
    condition = await workload.condition()
    return WorkloadInfo(
        name=workload.name,
        kind=workload.identity.kind,
        pid=workload.pid,
        status=condition.status,
        reason=_reason(workload.name, condition),
        memory=sum(region.length for region in workload.regions),
        resident=sum(map(_allocated, workload.regions)),
    )


def _reason(name: str, condition: Condition) -> str | None:
    """Return why a workload is paused; None if it runs, or was paused by its user."""
    if condition.status == "paused" and committed(Folder(Registry(), name)) is not None:
        return f"committed by a migration whose outcome is unknown; run `pageferry migrate {name} --recover`"
    return condition.reason


def _allocated(region: Region) -> int:
    return os.fstat(region.fd).st_blocks * 512
