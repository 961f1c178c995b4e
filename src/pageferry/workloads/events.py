"""Descriptions of workloads: results of `list`, `run`, `adopt` and `top`."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.events import Event
from pageferry.host.jobs import Job


class WorkloadInfo(Event, frozen=True, kw_only=True, tag="workload"):
    """Description of a workload."""

    name: str
    kind: str
    """`qemu` or `arena`."""
    pid: int
    """Process id in the PID namespace in which the workload was started."""
    status: str
    """`running`, `paused`, `committed` (the destination may own it), `moved`; `busy`: in use by another command;
    `unknown`: started in another PID namespace, and not accessible from this one.
    """
    reason: str | None = None
    """Reason why the workload is paused; None if it runs, or its user has paused it."""
    memory: int | None = None
    """Size of the memory, bytes; None if the workload is busy or unknown."""
    resident: int | None = None
    """Allocated memory, mapped or not, bytes; None if the workload is busy or unknown."""
    deferred: int = 0
    """Deferred contents, to be loaded from an image or fetched from another host, bytes."""
    stall_reason: str | None = None
    """Reason why deferred contents cannot be loaded: no pager, no connection, or unreadable pages; None if they can."""


class EndedWorkload(Event, frozen=True, kw_only=True, tag="ended-workload"):
    """Workload that has ended, and whose name no other workload has taken."""

    name: str
    kind: str
    """`qemu` or `arena`."""
    pid: int
    cause: Literal["exited", "stopped", "migrated"]
    """`exited`: the process has exited, or was killed by another program; `stopped`: pageferry has ended it;
    `migrated`: it was migrated to another host."""
    time: float
    """Time at which pageferry found that the process had exited, seconds since 1970."""
    exact: bool
    """Whether the process exited at that time. Otherwise it had exited before."""
    exit_code: int | None
    """Exit code; None if the process was killed by a signal, or if the code is unknown."""
    signal: str | None
    """Signal that killed the process, such as SIGSEGV; None if unknown."""
    log: bool
    """Whether `pageferry logs` prints a log."""
    last_line: str | None
    """Last line of the log; None if it is empty."""


class Listing(Event, frozen=True, tag="workloads"):
    """All workloads of a host."""

    workloads: list[WorkloadInfo]
    ended: list[EndedWorkload] = msgspec.field(default_factory=list)
    """Workloads that have ended, if they were requested."""


class HostMemory(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Memory of the host, bytes."""

    total: int
    available: int
    """Memory available to new processes without swapping, bytes."""
    large: int
    """Memory of processes and files that is backed by huge pages, excluding hugetlbfs, bytes."""
    swap: int
    swap_free: int


class WorkloadMemory(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Memory use of one workload at one point in time."""

    name: str
    kind: str
    pid: int
    memory: int | None
    """Resident memory of the process, including hugetlbfs, bytes; None if the process cannot be inspected."""
    large: int | None
    """Part of `memory` that is backed by huge pages, bytes; None if the process cannot be inspected."""
    deferred: int
    """Deferred contents, to be loaded from an image or fetched from another host, bytes."""
    stall_reason: str | None
    """Reason why deferred contents cannot be loaded; None if they can."""
    dirty_rate: int | None
    """Memory modified per second, bytes, as measured by a running migration in its last round; None without a
    migration."""
    jobs: list[Job]


class Overview(Event, frozen=True, kw_only=True, tag="top"):
    """Memory use of the host and of every registered workload at one point in time."""

    time: float
    """Time of the measurement, seconds since 1970."""
    host: HostMemory
    workloads: list[WorkloadMemory]
