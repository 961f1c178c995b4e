"""Block jobs of QEMU: progress, completion and cancellation.

Jobs are started with `auto-dismiss: false`, so that QEMU keeps the result of a job until it is dismissed. Their status
is polled in short sessions of the monitor, which other commands use in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.blocking import to_the_end
from pageferry.host.qmp import Command, Monitor
from pageferry.workloads.qemu.control import QemuControl

POLL = 0.1
"""Interval at which jobs are polled, seconds."""

Progress = Callable[[int, int], None]
"""Function that is called with the number of bytes done and the total."""

COMMIT = "pageferry-commit-"
"""Beginning of the ids of jobs that commit overlays."""

KEPT = {"auto-dismiss": False}
"""Argument with which QEMU keeps the result of a job."""


class Job(NamedTuple):
    """Status of a job."""

    status: str
    """QEMU's name for the status, such as `running`, `ready` or `concluded`."""
    done: int
    """Bytes of the disk that have been processed."""
    total: int
    error: str | None
    """Message of QEMU if the job has failed or was cancelled."""


async def query(monitor: Monitor, ids: Collection[str]) -> dict[str, Job]:
    """Return the jobs with these ids that exist. Raises WorkloadError, WorkloadDied."""
    return {
        job["id"]: Job(job["status"], job["current-progress"], job["total-progress"], job.get("error"))
        for job in await monitor.execute("query-jobs")
        if job["id"] in ids
    }


async def has_option(monitor: Monitor, command: str, option: str) -> bool:
    """Return whether a QMP command of this QEMU has an argument. Raises WorkloadError, WorkloadDied."""
    schema = {one["name"]: one for one in await monitor.execute("query-qmp-schema")}
    arguments = schema.get(schema.get(command, {}).get("arg-type", ""), {})
    return any(member["name"] == option for member in arguments.get("members", ()))


async def reach(
    control: QemuControl,
    ids: Collection[str],
    status: str,
    progress: Progress,
    *,
    each: Callable[[Mapping[str, Job]], Awaitable[None]] | None = None,
) -> dict[str, Job]:
    """Wait until all jobs have this status or have concluded, and return them. `progress` is called with the bytes done
    and the total of all jobs, `each` with the jobs, every `POLL` seconds.

    Raises WorkloadError if a job no longer exists, WorkloadDied if QEMU exits.
    """
    while True:
        async with control.session() as monitor:
            jobs = await query(monitor, ids)
        if missing := [name for name in ids if name not in jobs]:
            raise WorkloadError(
                f"cannot wait for block job {missing[0]}: another client of the monitor has ended it; retry"
            )
        progress(sum(job.done for job in jobs.values()), sum(job.total for job in jobs.values()))
        if all(job.status in (status, "concluded") for job in jobs.values()):
            return jobs
        if each is not None:
            await each(jobs)
        await asyncio.sleep(POLL)


async def cancel(control: QemuControl, ids: Collection[str]) -> None:
    """Cancel the jobs that still run, and wait until all have concluded. Jobs that do not exist are left out. Raises
    WorkloadDied, WorkloadError."""
    async with control.session() as monitor:
        for name in await query(monitor, ids):
            with contextlib.suppress(WorkloadError):  # the job has concluded
                await monitor.run(cancellation(name))
    while True:
        async with control.session() as monitor:
            jobs = await query(monitor, ids)
        if all(job.status == "concluded" for job in jobs.values()):
            return
        await asyncio.sleep(POLL)


async def dismiss(control: QemuControl, ids: Collection[str]) -> dict[str, Job]:
    """Dismiss the jobs that exist, all of which must have concluded. Return them. Raises WorkloadError,
    WorkloadDied."""
    async with control.session() as monitor:
        jobs = await query(monitor, ids)
        for name in jobs:
            await monitor.run(dismissal(name))
    return jobs


def cancellation(name: str) -> Command:
    """Return the command that cancels a job at once."""
    return {"execute": "block-job-cancel", "arguments": {"device": name, "force": True}}


def dismissal(name: str) -> Command:
    """Return the command that removes a concluded job. QEMU refuses it while the job runs."""
    return {"execute": "job-dismiss", "arguments": {"id": name}}


# -- commit of overlays


async def commit(
    control: QemuControl, commits: dict[str, dict[str, Any]], progress: Callable[[int, int], None]
) -> None:
    """Write active overlays back to their base images, and make the guest use the base images again (`block-commit`,
    ended by `job-complete`).

    `commits`: arguments of `block-commit` by id of the job. Jobs that remain from an earlier command, which was killed,
    are continued. Once the first job is completed, this function waits for the end of all jobs, even if it is
    cancelled: a disk whose job has ended uses its base image.

    After an error, the jobs are cancelled. Each disk then uses either its overlays or its base image; the caller must
    determine which. In all cases, the jobs have concluded, and the caller dismisses them. Raises WorkloadError with
    QEMU's message, WorkloadDied.
    """
    try:
        await _start(control, commits)
        jobs = await reach(control, list(commits), "ready", progress)
        _check(jobs)
        await to_the_end(_complete(control, jobs))
    except WorkloadDied:
        raise
    except BaseException:
        await to_the_end(cancel(control, list(commits)))
        raise


async def _complete(control: QemuControl, jobs: dict[str, Job]) -> None:
    async with control.session() as monitor:
        for name, job in jobs.items():
            if job.status == "ready":
                await monitor.execute("job-complete", id=name)
    _check(await reach(control, list(jobs), "concluded", lambda done, total: None))


def commit_id(overlay: Path) -> str:
    """Return the id of the job that commits an overlay, which is the same in each command."""
    return f"{COMMIT}{hashlib.blake2b(os.fsencode(overlay), digest_size=6).hexdigest()}"


async def _start(control: QemuControl, commits: dict[str, dict[str, Any]]) -> None:
    async with control.session() as monitor:
        running = await query(monitor, list(commits))
        for name, arguments in commits.items():
            if name in running and running[name].status == "concluded":
                await monitor.run(dismissal(name))
            elif name in running:
                continue
            await monitor.run({"execute": "block-commit", "arguments": {"job-id": name, **KEPT, **arguments}})


def _check(jobs: dict[str, Job]) -> None:
    for name, job in jobs.items():
        if job.error is not None:
            raise WorkloadError(f"cannot complete block job {name}: {job.error}")
