"""Records of running verbs, in the directory of the workload, for other commands to read.

::

    /run/pageferry/web/job-4711.json    `Job` of the verb that runs as process 4711

The verb replaces its record periodically, and removes the record at its end. No operation depends on the record, so it
is not synced. The next reader removes the record of a process that has exited without removing it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from pageferry.host import files, proc

VERSION = 1
_PREFIX = "job-"
MAX_LENGTH = 64 << 10
"""Maximum size of a record, bytes."""


class Job(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Running verb, with its progress."""

    version: int = VERSION
    pid: int
    started: int
    """`proc.start_time` of the process."""
    namespace: str | None = None
    """`proc.namespace` to which `pid` and `started` refer; None in records of older versions."""
    verb: str
    started_at: float
    """Start time, seconds since 1970."""
    phase: str = "starting"
    """Current phase, in one or two words."""
    fraction: float | None = None
    """Progress of the phase, 0 to 1; None if unknown."""
    dirty_rate: int | None = None
    """Dirty rate in the last round, bytes per second; None if it is not measured."""
    rate: int | None = None
    """Transfer rate, bytes per second."""


def write(folder: Path, job: Job) -> None:
    """Write the record of a job. Do nothing if the directory of the workload does not exist."""
    with contextlib.suppress(OSError):
        files.replace_file(folder / _name(job.pid), msgspec.json.encode(job))


def remove(folder: Path, pid: int) -> None:
    """Remove the record of a finished job."""
    with contextlib.suppress(OSError):
        (folder / _name(pid)).unlink()


def running(folder: Path) -> list[Job]:
    """Return the running verbs of a workload, in the order of their start. Remove the records of exited processes."""
    found, namespace = [], proc.namespace()
    for path in folder.glob(f"{_PREFIX}*.json"):
        job = _read(path)
        if job is None or job.version != VERSION:
            continue
        if job.namespace not in (None, namespace):
            continue  # the namespace of the record is not visible to this process
        if proc.is_alive(job.pid, job.started):
            found.append(job)
        else:
            remove(folder, job.pid)
    return sorted(found, key=lambda job: job.started_at)


def _read(path: Path) -> Job | None:
    try:
        return msgspec.json.decode(files.read_regular(path, MAX_LENGTH, follow=False), type=Job)
    except (OSError, msgspec.MsgspecError):
        return None  # removed by its process, or written by another version


def _name(pid: int) -> str:
    return f"{_PREFIX}{pid}.json"


def ours(verb: str, started_at: float) -> Job:
    """Return the record of a verb that runs as this process, started at `started_at` (seconds since 1970)."""
    started = proc.start_time(os.getpid())
    assert started is not None
    return Job(pid=os.getpid(), started=started, namespace=proc.namespace(), verb=verb, started_at=started_at)
