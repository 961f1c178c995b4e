"""Descriptions of workloads, bases and host memory (results of `list`, `run`, `adopt` and `top`), and progress of disk
operations."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.events import Event
from pageferry.host.jobs import Job


class DisksProgress(Event, frozen=True, kw_only=True, tag="disks-progress"):
    """Progress of copies of disks, or of overlays that are written back, sent several times a second."""

    workload: str
    done: int
    """Number of bytes processed."""
    total: int


class OverlayInfo(msgspec.Struct, frozen=True, rename="kebab"):
    """Disk of a guest that is an overlay over a frozen file (docs/disks.md)."""

    name: str
    overlay: str
    """File to which the guest writes."""
    frozen: str
    """File with the contents as of a checkpoint, which the command line of the guest may still name."""


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
    """Reason why deferred contents cannot be loaded: no pager, no connection, or unreadable pages; None if they can
    be loaded."""
    overlays: list[OverlayInfo] = msgspec.field(default_factory=list)
    """Disks that are overlays over frozen files."""


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
    """Whether the process exited at that time. If False, it had exited at an unknown earlier time."""
    exit_code: int | None
    """Exit code; None if the process was killed by a signal, or if the code is unknown."""
    signal: str | None
    """Signal that killed the process, such as SIGSEGV; None if unknown."""
    log: bool
    """Whether `pageferry logs` prints a log."""
    last_line: str | None
    """Last line of the log; None if the log is empty."""


class Listing(Event, frozen=True, tag="workloads"):
    """All workloads of a host."""

    workloads: list[WorkloadInfo]
    ended: list[EndedWorkload] = msgspec.field(default_factory=list)
    """Workloads that have ended, if they were requested."""


class BaseInfo(Event, frozen=True, kw_only=True, tag="base"):
    """Description of a base: memory that the clones of one image share."""

    image: str
    """Path of the image."""
    pager: int | None
    """Process id of the pager; None if it has exited."""
    memory: int
    """Size of the memory of one clone, bytes."""
    resident: int | None = None
    """Memory that the base occupies, bytes; None without a pager."""
    deferred: int = 0
    """Contents that are not loaded yet, bytes."""
    clones: list[str]
    """Names of the clones."""
    faults: list[int] = msgspec.field(default_factory=list)
    """Number of faults of each clone that the pager has resolved."""
    stall_reason: str | None = None
    """Reason why contents cannot be loaded; None if they can be loaded."""


class BaseListing(Event, frozen=True, tag="bases"):
    """All bases of a host."""

    bases: list[BaseInfo]


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
    """Reason why deferred contents cannot be loaded; None if they can be loaded."""
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
