"""`pageferry list`: the workloads of this host."""

from __future__ import annotations

import argparse
import asyncio
import os

import msgspec

from pageferry.errors import NoSuchWorkload, RestoreError, WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.registry import AnyEntry, ArenaEntry, Folder, QemuEntry, Registry
from pageferry.migration.ownership import committed
from pageferry.report.reporter import open_reporter
from pageferry.report.workloads import Listing, WorkloadInfo, WorkloadsView
from pageferry.workloads import deferred
from pageferry.workloads.base import Region
from pageferry.workloads.control.client import RemoteArena
from pageferry.workloads.qemu import MAY_RUN, MIGRATED, QemuWorkload

_RUNS_OR_WAITS = frozenset({"running", "inmigrate"})
_PAUSED_BY_USER = frozenset({"paused", "prelaunch"})
"""Run states of QEMU: of a guest that runs, or waits for its source; and after QMP `stop`, or with -S."""

TIMEOUT = 1.0
"""Seconds to wait for a workload that another command may be working on."""


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""
    parser.description = (
        "List the workloads of this host: those started by `pageferry run` or `pageferry receive`, those adopted, and "
        "the named arenas of Python programs. With --output json, one object of type `workload` a line."
    )


async def run(args: argparse.Namespace) -> int:
    """Look at every workload, all at the same time."""
    looks = [_look(name, entry) for name, entry in Registry().entries().items()]
    found = [info for info in await asyncio.gather(*looks) if info is not None]
    with open_reporter(args.output, WorkloadsView()) as reporter:
        if args.output == "human":
            reporter.final(Listing(found))
        else:
            for info in found:
                reporter.event(info)
    return 0


async def _look(name: str, entry: AnyEntry) -> WorkloadInfo | None:
    """What there is to say about a workload; None when it ends meanwhile."""
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
    """Completed by what is still to come of its memory."""
    try:
        status = await in_thread(deferred.status, Folder(Registry(), info.name))
    except RestoreError as error:
        return msgspec.structs.replace(info, waiting=str(error))
    if status is None:
        return info
    return msgspec.structs.replace(info, deferred=status.deferred, waiting=status.waiting)


async def _open(name: str, entry: AnyEntry) -> QemuWorkload | RemoteArena:
    match entry:
        case QemuEntry():
            return await QemuWorkload.attach(name, timeout=TIMEOUT)
        case ArenaEntry(control_socket=path):
            return await RemoteArena.connect(path)
        case _:
            raise NoSuchWorkload(f"{name} is still being started")


async def describe(workload: QemuWorkload | RemoteArena) -> WorkloadInfo:
    """What there is to say about an open workload. Raises WorkloadDied."""
    reason = None
    if isinstance(workload, RemoteArena):
        status = str(await workload.status())
    else:
        state = await workload.run_state()
        status = "running" if state == "running" else "paused"
        reason = _why_paused(workload.name, state)
    return WorkloadInfo(
        name=workload.name,
        kind=workload.identity.kind,
        pid=workload.pid,
        status=status,
        reason=reason,
        memory=sum(region.length for region in workload.regions),
        resident=sum(map(_allocated, workload.regions)),
    )


def _why_paused(name: str, state: str) -> str | None:
    """Why a guest in this run state of QEMU does not run; None for one that runs, or that its user has paused."""
    if state in _RUNS_OR_WAITS:
        return None
    if committed(Folder(Registry(), name)) is not None:
        return f"handed over by a migration whose outcome is not known: pageferry migrate {name} --recover"
    if state == MIGRATED:
        return f"QEMU's own migration has completed, which pageferry did not start: {MAY_RUN}"
    return None if state in _PAUSED_BY_USER else f"QEMU state {state}"


def _allocated(region: Region) -> int:
    return os.fstat(region.fd).st_blocks * 512
