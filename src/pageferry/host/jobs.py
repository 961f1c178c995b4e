"""What verbs at work say about themselves, for others to see: a small record in the folder of the workload.

::

    /run/pageferry/web/job-4711.json    a Job of the verb that is process 4711

The verb writes it anew every now and then and removes it at its end. Nothing depends on it: it is not synced, and the
record of a process that has ended without removing it is passed over, and removed by whoever finds it.
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
"""Bytes of a record that is read."""


class Job(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """A verb at work, and how far it is."""

    version: int = VERSION
    pid: int
    started: int
    """`proc.start_time` of the process."""
    namespace: str | None = None
    """`proc.namespace` of which `pid` and `started` are; None in records of older versions."""
    verb: str
    begun: float
    """Seconds since 1970."""
    phase: str = "starting"
    """What it does at the moment, in a word or two."""
    part: float | None = None
    """How much of that is done, 0 to 1; None: that cannot be told."""
    dirty_rate: int | None = None
    """Bytes of memory that the workload modifies per second, as of the last round; None: it does not look."""
    rate: int | None = None
    """Bytes per second that it moves."""


def write(folder: Path, job: Job) -> None:
    """Say how far we are. Nothing happens where the workload's folder is not there (yet, or any more)."""
    with contextlib.suppress(OSError):
        files.replace_file(folder / _name(job.pid), msgspec.json.encode(job))


def remove(folder: Path, pid: int) -> None:
    """We are done."""
    with contextlib.suppress(OSError):
        (folder / _name(pid)).unlink()


def running(folder: Path) -> list[Job]:
    """The verbs at work on a workload, those that began first first."""
    found, namespace = [], proc.namespace()
    for path in folder.glob(f"{_PREFIX}*.json"):
        job = _read(path)
        if job is None or job.version != VERSION:
            continue
        if job.namespace not in (None, namespace):
            continue  # whether it runs cannot be judged from this namespace
        if proc.is_alive(job.pid, job.started):
            found.append(job)
        else:
            remove(folder, job.pid)
    return sorted(found, key=lambda job: job.begun)


def _read(path: Path) -> Job | None:
    try:
        return msgspec.json.decode(files.read_regular(path, MAX_LENGTH, follow=False), type=Job)
    except (OSError, msgspec.MsgspecError):
        return None  # it has just ended, or is of another pageferry


def _name(pid: int) -> str:
    return f"{_PREFIX}{pid}.json"


def ours(verb: str, begun: float) -> Job:
    """A job of this process."""
    started = proc.start_time(os.getpid())
    assert started is not None
    return Job(pid=os.getpid(), started=started, namespace=proc.namespace(), verb=verb, begun=begun)
