"""What a restore tells on the way and at its end."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.events import Event, Latency


class RunningEvent(Event, frozen=True, kw_only=True, tag="running"):
    """The guest runs, or is paused as it was when it was saved; its memory arrives."""

    workload: str
    time_to_running: float
    """Milliseconds, QEMU's own start apart."""
    deferred: int
    """Bytes whose contents are still to come."""
    paused: bool = False


class EagerEvent(Event, frozen=True, kw_only=True, tag="restore-eager"):
    """All contents are loaded before the workload runs, because they cannot be loaded on demand."""

    image: str
    length: int
    """Bytes of memory in the image."""
    reason: str
    """Why page faults of the workload cannot be handled, and what to do about it."""


class ProgressEvent(Event, frozen=True, kw_only=True, tag="restore-progress"):
    """How far it is. Sent several times a second."""

    deferred: int
    faults: int
    missed: int
    """Faults to pages whose contents were still to come."""
    prefetched: int
    """Pages that were read before they were asked for."""
    bytes_read: int
    failures: list[str]
    """Pages that cannot be had, and why."""


class TouchedEvent(Event, frozen=True, kw_only=True, tag="touched"):
    """What the guest has missed since the last of these."""

    windows: list[int]
    """Windows of 16 pages, counted over all regions, in the order of their faults; one may come again."""


class TimeToRunning(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Where the time went until the guest ran, milliseconds: consecutive parts, which add up to `total`, and
    `open_image`, which overlaps with the first two."""

    total: float
    qemu_start: float
    """From the start of QEMU until its monitor had answered and its memory was found."""
    open_image: float
    """While QEMU starts; what of it takes longer than that is in `adopt`."""
    adopt: float
    """Until every access to missing memory came to the pager."""
    load: float = 0.0
    """Loading all contents, where they cannot be loaded on demand."""
    device_state: float
    resume: float


class RestoreResult(Event, frozen=True, kw_only=True, tag="restore"):
    """A restore, when the guest runs (`active`) or when all of its memory is there (`completed`).

    Times in milliseconds unless named otherwise, sizes in bytes.
    """

    status: Literal["active", "completed"]
    workload: str
    image: str
    paused: bool = False
    """Whether the guest was saved while its user had paused it: it is paused now, until its user resumes it."""
    time_to_running: float
    """From the command to the guest running, QEMU's own start apart."""
    time_parts: TimeToRunning
    memory: int
    deferred: int
    """Contents still to come."""
    faults: int
    """Accesses that waited for the pager."""
    missed: int
    """Of these, those to pages whose contents were still to come."""
    prefetched: int
    """Pages that were read before they were asked for."""
    bytes_read: int
    """Of the image's storage blocks."""
    service_us: float
    """Mean time of the service of a fault, microseconds."""
    longest_us: float
    service_times: Latency
    eager_reason: str | None = None
    """Why all contents were loaded before the guest ran; None: they are loaded on demand."""
