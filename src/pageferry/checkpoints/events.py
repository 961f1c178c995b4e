"""What a checkpoint tells on the way and at its end."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.checkpoints.options import Mode
from pageferry.events import Event, Latency
from pageferry.images.metadata import Codec


class ArmedEvent(Event, frozen=True, kw_only=True, tag="armed"):
    """Everything is protected; the workload has not been paused yet."""

    memory: int
    """Bytes of all regions."""
    present: int
    """Bytes of them that are in memory."""
    large_pages: int
    arm_ms: float


class InstantEvent(Event, frozen=True, kw_only=True, tag="instant"):
    """The workload runs on, or stays paused if its user had paused it; its memory is saved as of this pause."""

    downtime: float
    """Milliseconds."""
    paused: bool = False
    """Whether it stays paused."""


class SavingEvent(Event, frozen=True, kw_only=True, tag="saving"):
    """How far it is. Sent several times a second."""

    done: int
    """Pages."""
    total: int
    """Pages that were in memory."""
    traps: int
    stored: int
    """Bytes of storage blocks."""


class Downtime(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Where the time went in which the workload did not run, milliseconds."""

    total: float
    stop: float
    device_state: float
    protect: float
    """Protecting again what was written to meanwhile."""
    save: float
    """Mode `stop` only: all the work."""
    resume: float


class PageCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Pages by class; together they are all pages of the workload."""

    absent: int
    """Not in memory."""
    zero: int
    pattern: int
    """One 64-bit word, repeated."""
    same_as: int
    """The same as another page of the image."""
    data: int
    in_parent: int
    """Contents are those of the parent image, whatever their class."""


class TrapCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """How traps went."""

    before: int
    """Before the instant: only released, and protected again in the pause."""
    longest_us: float
    mean_us: float
    staging_waits: int
    """Traps that found the staging buffer full."""


class CheckpointResult(Event, frozen=True, kw_only=True, tag="checkpoint"):
    """The end of a checkpoint. Times in milliseconds, sizes in bytes."""

    status: Literal["completed"]
    workload: str
    image: str
    """Absolute path."""
    id: str
    digest: str
    """By these a child names the image as its parent."""
    parent: str | None
    tracking: Literal["trace", "compare", "none"]
    """How it was found what the parent holds: by the trace that it left, or by comparing all pages."""
    tracking_note: str
    """Why there was no trace to be used."""
    tracked: bool
    """Whether a trace was left for the next one: the first write to each page costs a minor fault then."""
    written: int
    """Pages that the trace reported as written, counted once a round."""
    rounds: int
    """Rounds in which they were saved before the pause."""
    drains: int = 0
    """Short pauses before those rounds, in which direct I/O ended."""
    drain_time: float = 0.0
    """Milliseconds that the workload was paused for them."""
    mode: Mode
    codec: Codec
    total_time: float
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    """Consecutive phases, which add up to `total-time`: set-up, arm (protect, and save in rounds), stop, state,
    protect, resume, save, publish (huge mappings restored, image named). Those from stop to resume are the downtime; in
    mode `stop`, arm and save are among them."""
    arm_time: float
    """Protecting everything, while the workload ran."""
    downtime: float
    downtime_parts: Downtime
    memory: int
    pages: PageCount
    bytes_written: int
    """Length of the image."""
    writes: int
    """Write calls."""
    mean_write: int
    blocks: int
    """Storage blocks."""
    traps: int
    """Writes of the workload that had to wait for their page block to be copied."""
    trap_details: TrapCount
    paused: bool = False
    """Whether its user had paused the workload: it stays so, and so does one that is restored from the image."""
    compression: float
    """Bytes of data pages for each byte in storage blocks; 1 where there are none."""


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
