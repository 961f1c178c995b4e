"""Events and results of checkpoints and restores."""

from __future__ import annotations

from typing import Literal

import msgspec

from pageferry.checkpoints.options import Mode
from pageferry.events import Event, Latency
from pageferry.images.metadata import Codec


class ArmedEvent(Event, frozen=True, kw_only=True, tag="armed"):
    """All memory is ready to be saved. In mode `lazy`, it is write-protected, and the workload has not been paused
    yet."""

    memory: int
    """Size of all regions, bytes."""
    present: int
    """Memory that is present, bytes."""
    large_pages: int
    """Number of huge pages in the memory."""
    arm_ms: float
    """Time to protect the memory and to save in rounds, milliseconds."""


class InstantEvent(Event, frozen=True, kw_only=True, tag="snapshot-point"):
    """The pause at the snapshot point has ended. The workload runs, or stays paused if its user had paused
    it."""

    downtime: float
    """Duration of the pause, milliseconds."""
    paused: bool = False
    """Whether the workload stays paused."""


class SavingEvent(Event, frozen=True, kw_only=True, tag="checkpoint-progress"):
    """Progress of a checkpoint, emitted several times a second."""

    done: int
    """Number of pages saved."""
    total: int
    """Number of pages that were present when the checkpoint started."""
    traps: int
    """Number of writes of the workload that waited until their trap block was copied."""
    stored: int
    """Total length of the storage blocks, bytes."""


class SavedDiskSummary(msgspec.Struct, frozen=True, rename="kebab"):
    """Disk whose contents were saved together with the memory of a guest."""

    id: str
    name: str
    path: str
    """File with the contents as of the snapshot point: the file of the disk, which is frozen, or a copy."""
    overlay: str | None
    """File to which the guest writes since the snapshot point; None if the disk was copied."""


class Downtime(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Parts of the time in which the workload did not run, milliseconds."""

    total: float
    stop: float
    disks: float = 0.0
    """Time to freeze disks, or to start their copies."""
    device_state: float
    protect: float
    """Time to re-protect the pages that were written after a round had saved them."""
    save: float
    """Time to save all memory; 0 except in mode `stop`."""
    resume: float


class PageCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Number of pages by class. The numbers add up to all pages of the workload."""

    absent: int
    """Pages that are not present."""
    zero: int
    pattern: int
    """Pages filled with one repeated 64-bit word."""
    same_as: int
    """Pages identical to another page of the image."""
    data: int
    """Pages with any other contents."""
    in_parent: int
    """Pages identical to the same page of the parent image, regardless of their contents."""


class TrapCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Statistics of traps, the first writes of the workload to protected memory."""

    before: int
    """Number of traps before the snapshot point. Such a trap only unprotected the page, which was protected again in
    the pause."""
    longest_us: float
    mean_us: float
    staging_waits: int
    """Number of traps that found the staging buffer full."""


class UploadSummary(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Upload of the image of a checkpoint to a store."""

    manifest: str
    """Digest of the manifest, hexadecimal."""
    uploaded: int
    """Bytes uploaded, manifests and missing parents included."""
    blocks: int
    """Number of storage blocks that the store did not contain."""
    spool: int
    """Maximum space of the spool, bytes."""
    encrypted: bool


class CheckpointResult(Event, frozen=True, kw_only=True, tag="checkpoint"):
    """Result of a checkpoint. Times are in milliseconds, and sizes in bytes."""

    status: Literal["completed"]
    workload: str
    image: str
    """Absolute path of the image, or its URL in a store."""
    id: str
    """Identifier of the image."""
    digest: str
    """Digest of the image. A child refers to its parent by id and digest."""
    parent: str | None
    tracking: Literal["trace", "compare", "private", "none"]
    """Method by which the pages that the parent contains were found: the write trace since the parent, or a comparison
    of all pages; `private` for a clone, whose private pages are stored; `none` without a parent."""
    tracking_note: str
    """Reason why no write trace could be used; empty if there is none."""
    tracked: bool
    """Whether a write trace was left for the next checkpoint. The first write to each page then costs a minor fault."""
    written: int
    """Number of pages that the write trace reported, counted once per round."""
    rounds: int
    """Number of rounds that saved written pages before the pause."""
    drains: int = 0
    """Number of short pauses, before rounds, in which direct I/O was completed."""
    drain_time: float = 0.0
    """Total duration of the short pauses for direct I/O, milliseconds."""
    mode: Mode
    codec: Codec
    total_time: float
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    """Duration of the consecutive phases, which add up to `total-time`: set-up, arm (protect, and save in rounds),
    stop, state, protect, resume, save, publish (restore huge mappings, name the image). The phases from stop to resume
    are the downtime; in mode `stop`, the downtime includes arm and save."""
    arm_time: float
    """Time to protect the memory and to save in rounds."""
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
    """Number of writes of the workload that waited until their trap block was copied."""
    trap_details: TrapCount
    disks: list[SavedDiskSummary] = msgspec.field(default_factory=list)
    """Disks that were saved with the image."""
    upload: UploadSummary | None = None
    """Upload to a store; None for a file."""
    paused: bool = False
    """Whether the user had paused the workload before the checkpoint. It stays paused, and is paused after a restore
    from the image."""
    compression: float
    """Compression ratio of the data pages; 1 if there are none."""


class RunningEvent(Event, frozen=True, kw_only=True, tag="running"):
    """The guest runs, or is paused because it was paused when it was saved, or because the caller requested it. Its
    deferred memory is being loaded."""

    workload: str
    time_to_running: float
    """Time from the start of the command until the guest ran, without the start of QEMU, milliseconds."""
    deferred: int
    """Deferred memory, bytes."""
    paused: bool = False
    was_paused: bool = False
    """Whether the guest was paused when it was saved."""


class EagerEvent(Event, frozen=True, kw_only=True, tag="restore-eager"):
    """All contents are loaded before the workload runs, because they cannot be loaded on demand."""

    image: str
    length: int
    """Memory in the image, bytes."""
    reason: str
    """Reason why page faults of the workload cannot be handled, and a remedy."""


class ProgressEvent(Event, frozen=True, kw_only=True, tag="restore-progress"):
    """Progress of a restore, emitted several times a second."""

    deferred: int
    """Deferred memory, bytes."""
    faults: int
    """Number of accesses that waited for the pager."""
    missed: int
    """Number of accesses that waited for the pager and whose page was deferred."""
    prefetched: int
    """Number of pages loaded before they were requested."""
    bytes_read: int
    """Number of bytes of storage blocks read."""
    failures: list[str]
    """Pages that cannot be read, with the cause."""


class TouchedEvent(Event, frozen=True, kw_only=True, tag="touched"):
    """Pages that the guest has accessed while they were deferred, since the previous event of this type."""

    windows: list[int]
    """Windows of 16 pages, numbered over all regions, in the order of their faults. A window can be listed more than
    once."""


class TimeToRunning(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Parts of the time until the guest ran, milliseconds. The parts are consecutive and add up to `total`, except
    `open_image`, which overlaps with `qemu_start` and `adopt`."""

    total: float
    qemu_start: float
    """Time from the start of QEMU until its monitor replied and its memory was found."""
    open_image: float
    """Time to open the image while QEMU starts. The part after the start of QEMU is included in `adopt`."""
    adopt: float
    """Time until the pager handled every access to missing memory."""
    load: float = 0.0
    """Time to load all contents, if they cannot be loaded on demand."""
    device_state: float
    resume: float


class RestoreResult(Event, frozen=True, kw_only=True, tag="restore"):
    """Result of a restore, when the guest runs (`active`) or when all of its memory is loaded (`completed`).

    Times are in milliseconds unless stated otherwise, and sizes in bytes.
    """

    status: Literal["active", "completed"]
    workload: str
    image: str
    paused: bool = False
    """Whether the guest is paused, until its user resumes it."""
    was_paused: bool = False
    """Whether the guest was paused when it was saved."""
    time_to_running: float
    """Time from the start of the command until the guest ran, without the start of QEMU."""
    time_parts: TimeToRunning
    memory: int
    deferred: int
    """Deferred memory."""
    faults: int
    """Number of accesses that waited for the pager."""
    missed: int
    """Number of accesses that waited for the pager and whose page was deferred."""
    prefetched: int
    """Number of pages loaded before they were requested."""
    bytes_read: int
    """Number of bytes of storage blocks read."""
    service_us: float
    """Mean service time of a fault, microseconds."""
    longest_us: float
    service_times: Latency
    eager_reason: str | None = None
    """Reason why all contents were loaded before the guest ran; None if they are loaded on demand."""
    overlays: dict[str, str] = msgspec.field(default_factory=dict)
    """Path of the new overlay of each disk that was saved with the image, by the id of the disk."""


class CloneInfo(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Guest that was started as a clone."""

    name: str
    pid: int
    """Process id of QEMU."""
    time_to_running: float
    """Time from the start of the command until the guest ran, including the start of QEMU, milliseconds."""
    private: int | None
    """Memory that no other guest shares, when all guests ran, bytes; None if QEMU has exited."""


class CloneResult(Event, frozen=True, kw_only=True, tag="clone"):
    """Result of `pageferry clone`: all guests run."""

    image: str
    memory: Literal["own", "shared"]
    """Whether the guests share one copy of the image's memory."""
    time_to_all_running: float
    """Time from the start of the command until all guests ran, milliseconds."""
    clones: list[CloneInfo]
