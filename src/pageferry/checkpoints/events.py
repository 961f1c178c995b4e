"""Events and results of checkpoints and restores."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.checkpoints.options import Mode
from pageferry.events import Event, Latency
from pageferry.images.metadata import Codec


class ArmedEvent(Event, frozen=True, kw_only=True, tag="armed"):
    """All memory is protected; the workload has not been paused yet."""

    memory: int
    """Size of all regions, bytes."""
    present: int
    """Memory that is present, bytes."""
    large_pages: int
    """Number of huge pages."""
    arm_ms: float
    """Time for protecting the memory, milliseconds."""


class InstantEvent(Event, frozen=True, kw_only=True, tag="snapshot-point"):
    """The pause at which the memory is saved has ended. The workload runs, or stays paused if its user had paused
    it."""

    downtime: float
    """Duration of the pause, milliseconds."""
    paused: bool = False
    """Whether the workload stays paused."""


class SavingEvent(Event, frozen=True, kw_only=True, tag="checkpoint-progress"):
    """Progress of a checkpoint. Sent several times a second."""

    done: int
    """Pages saved."""
    total: int
    """Pages that were present."""
    traps: int
    """Writes of the workload that waited for their page block to be copied."""
    stored: int
    """Length of the storage blocks, bytes."""


class Downtime(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Parts of the time in which the workload did not run, milliseconds."""

    total: float
    stop: float
    device_state: float
    protect: float
    """Protecting again the pages written since they were saved in rounds."""
    save: float
    """Saving all memory; mode `stop` only."""
    resume: float


class PageCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Number of pages by class; together they are all pages of the workload."""

    absent: int
    """Not present."""
    zero: int
    pattern: int
    """Filled with one 64-bit word."""
    same_as: int
    """Identical to another page of the image."""
    data: int
    """All other contents."""
    in_parent: int
    """Identical to the same page of the parent image, regardless of the class."""


class TrapCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Statistics of traps."""

    before: int
    """Traps before the snapshot point: the page was only unprotected, and protected again in the pause."""
    longest_us: float
    mean_us: float
    staging_waits: int
    """Number of traps that found the staging buffer full."""


class CheckpointResult(Event, frozen=True, kw_only=True, tag="checkpoint"):
    """Result of a checkpoint. Times in milliseconds, sizes in bytes."""

    status: Literal["completed"]
    workload: str
    image: str
    """Absolute path."""
    id: str
    """Identifier of the image."""
    digest: str
    """Digest of the image. A child refers to its parent by id and digest."""
    parent: str | None
    tracking: Literal["trace", "compare", "none"]
    """How the pages that the parent holds were found: from the write trace that it left, or by comparing all pages."""
    tracking_note: str
    """Why no write trace could be used."""
    tracked: bool
    """Whether a write trace was left for the next checkpoint: each first write to a page then costs a minor fault."""
    written: int
    """Number of pages that the write trace reported, counted once per round."""
    rounds: int
    """Number of rounds in which they were saved before the pause."""
    drains: int = 0
    """Number of short pauses before these rounds in which direct I/O was completed."""
    drain_time: float = 0.0
    """Total duration of these pauses, milliseconds."""
    mode: Mode
    codec: Codec
    total_time: float
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    """Duration of the consecutive phases, which add up to `total-time`: set-up, arm (protect, and save in rounds),
    stop, state, protect, resume, save, publish (restore huge mappings, name the image). The phases from stop to resume
    are the downtime; in mode `stop`, it includes arm and save."""
    arm_time: float
    """Time for protecting the memory while the workload ran."""
    downtime: float
    downtime_parts: Downtime
    memory: int
    pages: PageCount
    bytes_written: int
    """Length of the image."""
    writes: int
    """Number of write calls."""
    mean_write: int
    blocks: int
    """Number of storage blocks."""
    traps: int
    """Writes of the workload that waited for their page block to be copied."""
    trap_details: TrapCount
    paused: bool = False
    """Whether its user had paused the workload: it stays paused, and is so after a restore from the image."""
    compression: float
    """Compression ratio of the data pages; 1 if there are none."""


class RunningEvent(Event, frozen=True, kw_only=True, tag="running"):
    """The guest runs, or is paused as it was when it was saved; its memory is being loaded."""

    workload: str
    time_to_running: float
    """Milliseconds, without the start of QEMU."""
    deferred: int
    """Deferred memory, bytes."""
    paused: bool = False


class EagerEvent(Event, frozen=True, kw_only=True, tag="restore-eager"):
    """All contents are loaded before the workload runs, because they cannot be loaded on demand."""

    image: str
    length: int
    """Memory in the image, bytes."""
    reason: str
    """Why page faults of the workload cannot be handled, and what to do about it."""


class ProgressEvent(Event, frozen=True, kw_only=True, tag="restore-progress"):
    """Progress of a restore. Sent several times a second."""

    deferred: int
    """Deferred memory, bytes."""
    faults: int
    """Number of accesses that waited for the pager."""
    missed: int
    """Number of these accesses whose page was deferred."""
    prefetched: int
    """Number of pages loaded before they were requested."""
    bytes_read: int
    """Bytes of storage blocks read."""
    failures: list[str]
    """Pages that cannot be read, with the cause."""


class TouchedEvent(Event, frozen=True, kw_only=True, tag="touched"):
    """Pages that the guest has accessed while they were deferred, since the last of these events."""

    windows: list[int]
    """Windows of 16 pages, numbered over all regions, in the order of their faults; may contain duplicates."""


class TimeToRunning(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Parts of the time until the guest ran, milliseconds: consecutive ones, which add up to `total`, and `open_image`,
    which overlaps with the first two."""

    total: float
    qemu_start: float
    """From the start of QEMU until its monitor replied and its memory was found."""
    open_image: float
    """Opening the image while QEMU starts; time beyond that start is part of `adopt`."""
    adopt: float
    """Until the pager handled every access to missing memory."""
    load: float = 0.0
    """Loading all contents, if they cannot be loaded on demand."""
    device_state: float
    resume: float


class RestoreResult(Event, frozen=True, kw_only=True, tag="restore"):
    """Result of a restore, when the guest runs (`active`) or when all of its memory is loaded (`completed`).

    Times in milliseconds unless stated otherwise, sizes in bytes.
    """

    status: Literal["active", "completed"]
    workload: str
    image: str
    paused: bool = False
    """Whether the guest was paused by its user when it was saved; it stays paused until its user resumes it."""
    time_to_running: float
    """From the start of the command until the guest ran, without the start of QEMU."""
    time_parts: TimeToRunning
    memory: int
    deferred: int
    """Deferred memory."""
    faults: int
    """Number of accesses that waited for the pager."""
    missed: int
    """Number of these accesses whose page was deferred."""
    prefetched: int
    """Number of pages loaded before they were requested."""
    bytes_read: int
    """Bytes of storage blocks read."""
    service_us: float
    """Mean service time of a fault, microseconds."""
    longest_us: float
    service_times: Latency
    eager_reason: str | None = None
    """Why all contents were loaded before the guest ran; None if they are loaded on demand."""
