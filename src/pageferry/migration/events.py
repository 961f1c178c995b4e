"""Events and result of a migration. Names are those of QEMU's MigrationStats where QEMU has an equivalent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import msgspec

from pageferry.events import Event, Latency
from pageferry.migration.transport.messages import Mode

Status = Literal["completed", "failed", "cancelled"]
PostcopyStatus = Literal["postcopy-active", "postcopy-paused", "postcopy-recover"]


MAX_CELLS = 1024
"""Maximum number of cells in a map of huge pages."""


class SetupEvent(Event, frozen=True, kw_only=True, tag="setup"):
    """The source is connected and the write traces are installed."""

    peer: str
    """Address of the destination."""
    memory: int
    """Size of all regions, bytes."""
    present: int
    """Memory that is present, bytes."""
    large_pages: int
    """Number of huge pages."""
    install_ms: float
    """Time for installing the write traces, milliseconds."""


class LargeMap(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Distribution of huge pages in a region, as a line of at most 1024 cells."""

    region: str
    length: int
    """Length of the region, bytes."""
    per_cell: int
    """Number of 2 MiB units per cell; the last cell may have fewer."""
    cells: list[int]
    """Number of huge pages in each cell."""

    @classmethod
    def of(cls, region: str, length: int, units: Sequence[bool]) -> Self:
        """Return the map of a region. `units`: whether each 2 MiB unit is backed by a huge page."""
        per_cell = max(-(-len(units) // MAX_CELLS), 1)
        cells = [sum(units[start : start + per_cell]) for start in range(0, len(units), per_cell)]
        return cls(region=region, length=length, per_cell=per_cell, cells=cells)


class LargePagesEvent(Event, frozen=True, kw_only=True, tag="large-page-map"):
    """Distribution of huge pages in the workload's memory."""

    side: Literal["source", "destination"]
    """`source`: at the start of the migration; `destination`: a second after the workload resumed (in post-copy: after
    the last page was received)."""
    regions: list[LargeMap]


class RoundEvent(Event, frozen=True, kw_only=True, tag="round"):
    """A round has been sent and acknowledged."""

    round: int
    pages: int
    """Number of pages sent, of all classes. The numbers of all rounds add up to the sum of `normal`, `duplicate` and
    `skipped`."""
    sent: int
    """Bytes on the wire. The numbers of all rounds add up to `transferred`."""
    remaining: int
    """Memory left for the next round, bytes: modified during the round, or not sent because of a switch-over."""
    ms: float
    """Duration, milliseconds."""
    mbps: float
    """Megabits per second on the wire."""
    dirty_rate: int
    """Bytes of memory modified per second; 0 for a round of the switch-over, for which the rate is not measured."""
    cpu_throttle_percentage: int = 0
    """CPU time withheld from the workload during the round, per cent (auto-converge)."""
    switch_over: bool = False
    """Whether the round was sent just before, during, or after the pause of the switch-over. Such rounds are reported
    when the workload runs again."""
    postcopy: bool = False
    """Whether the pages were sent after the switch-over, on request and in the background."""


class ProgressEvent(Event, frozen=True, kw_only=True, tag="progress"):
    """Progress of a round, sent several times a second."""

    round: int
    done: int
    """Number of pages sent so far."""
    total: int
    """Number of pages of the round."""
    mbps: float
    """Megabits per second on the wire."""


class DiskProgressEvent(Event, frozen=True, kw_only=True, tag="disk-progress"):
    """Progress of the copies of all disks together, sent several times a second."""

    done: int
    """Bytes copied so far, including those copied again because the guest has written to them."""
    total: int
    """Bytes to copy, as known so far. Writes of the guest increase it."""
    remaining: int
    """Bytes left to copy."""
    ready: bool
    """Whether every disk has been copied once."""
    sent: int
    """Bytes on the wire for the disks so far. Zeros need few bytes."""
    mbps: float
    """Megabits per second on the wire for the disks."""


class PostcopyEvent(Event, frozen=True, kw_only=True, tag="postcopy"):
    """Progress of post-copy at the source or the destination, sent several times a second."""

    status: PostcopyStatus
    remaining: int
    """Deferred memory, bytes."""
    postcopy_requests: int
    """Number of requests from the destination."""
    mbps: float
    """Megabits per second on the wire; 0 at the destination."""


class Downtime(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Work done in the pause, milliseconds. These parts overlap, and do not include the transit of messages; `phases`
    contains the consecutive phases of the pause."""

    total: float
    """Time during which neither side ran the workload."""
    stop: float
    """Pausing the workload at the source: phase `stop`."""
    last_pages: float
    """Sending the last pages. The device state is saved at the same time."""
    device_state: float
    """Saving the device state, while the last pages are sent, and loading it at the destination, in phase `load`."""
    populate: float
    """Mapping memory at the destination, after the state is loaded."""
    resume: float
    """Resuming the workload at the destination, in phase `hand-over`."""
    disks: float = 0.0
    """Completing the copies of disks, before the device state is saved."""


class LargePageCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Huge pages that back the workload's memory."""

    source: int
    destination: int
    fallbacks: int
    """Number of huge pages of the source for which the destination had no free huge page."""


class PopulateCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Page-table entries populated before the workload resumed (S1, S5)."""

    mode: str
    """Value of `populate`."""
    large: int
    """Number of PMD mappings, each of a huge page."""
    small: int
    """Number of PTE mappings, each of a base page."""
    failed: int
    """Number of huge pages that could not be mapped; the first access maps them."""
    work_ms: float
    """Time of the populating threads, milliseconds; all but `downtime.populate` overlaps the transfer."""


class FaultCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Page faults of the workload's threads in the first second at the destination."""

    minor: int
    major: int


class TraceCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Statistics of the write trace (S2)."""

    granularity: str
    install_ms: float
    """Time for installing the trace, milliseconds."""
    released_units: int
    """Number of 2 MiB units unprotected as a whole."""


class PostcopyCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Statistics of the post-copy phase."""

    time: float
    """Milliseconds from the message Running until every page was present."""
    pages: int
    """Number of pages missing at the switch-over."""
    faults: int
    """Number of accesses that waited for a page."""
    service_us: float
    """Average time that an access waited for a missing page, microseconds."""
    waits: Latency
    """Distribution of the waiting times."""


class DirectIo(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Direct I/O of the workload, and the measures that ensure that its writes are transferred (S2)."""

    drains: int = 0
    """Number of short pauses before the switch-over in which I/O requests completed; 0 without direct I/O."""
    time: float = 0.0
    """Total duration of these pauses, milliseconds."""
    longest: float = 0.0
    """Longest of these pauses, milliseconds."""
    pinned_pages: int = 0
    """Number of pages sent during the pause because they belong to buffers registered with io_uring."""


class DiskCopy(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Disk that was copied to the destination. The disk at the source is unchanged since the pause, and not in use."""

    name: str
    """Name of the drive or of the block node."""
    path: str
    """File or device at the source."""
    size: int
    """Size of the disk, bytes."""


class CloneMove(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Memory of a clone that was migrated."""

    image: str
    """Image whose memory it shared at the source."""
    shared: bool
    """Whether it shares the memory of that image at the destination, so that only private pages were sent."""
    private: int
    """Private memory at the start of the migration, bytes."""
    reason: str | None = None
    """Reason why it does not share the memory at the destination; None if it does."""


class MigrationResult(Event, frozen=True, kw_only=True, tag="migration"):
    """Result of a migration. Times are in milliseconds, sizes in bytes."""

    status: Status
    mode: Mode
    workload: str
    peer: str
    paused: bool = False
    """Whether the workload is paused at the destination, because its user had paused it."""
    total_time: float
    setup_time: float
    downtime: float
    downtime_parts: Downtime
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    """Duration of the consecutive phases, which add up to `total-time`: setup, copy, disks (wait until disks are
    copied, with --copy-disks), prepare (for the pause), stop, last-pages (with completing the copies of disks and
    saving the state), load (until the destination is ready), hand-over (until the workload runs there), and postcopy or
    report. The phases from stop to hand-over are the downtime."""
    transferred: int
    """Bytes on the wire, without control messages, device state and disks."""
    memory: int
    normal: int
    """Number of pages sent with their contents."""
    duplicate: int
    """Number of pages sent as zeros."""
    skipped: int
    """Number of pages that are not present."""
    dirty_sync_count: int
    """Number of collections of the write trace."""
    mbps: float
    large_pages: LargePageCount
    populated: PopulateCount
    faults_after_resume: FaultCount | None
    """Page faults after the workload resumed; None if the destination has not reported them."""
    trace: TraceCount
    direct_io: DirectIo = DirectIo()
    cpu_throttle_percentage: int = 0
    """Maximum CPU time withheld from the workload during the migration, per cent (auto-converge)."""
    postcopy_requests: int = 0
    """Number of pages that the destination requested because of page faults."""
    postcopy: PostcopyCount | None = None
    """Post-copy phase; None if every page was present before the workload resumed."""
    disks: list[DiskCopy] = msgspec.field(default_factory=list)
    """Disks that were copied."""
    disks_transferred: int = 0
    """Bytes on the wire for the disks."""
    clone: CloneMove | None = None
    """Memory of a clone; None for any other workload."""


class Listening(Event, frozen=True, tag="listening"):
    """The receiver accepts connections from sources."""

    workload: str
    address: str


class Received(Event, frozen=True, tag="received"):
    """The workload runs on this host, or is paused because its user had paused it at the source."""

    workload: str
    kind: str
    paused: bool = False
    total_time: float = 0.0
    """Milliseconds from the acceptance of the source until the workload ran on this host."""
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    """Consecutive phases, which add up to `total-time`: setup (connections, memory), copy (rounds, state), load,
    populate, commit (wait for the decision of the source), resume."""


class Resumed(Event, frozen=True, tag="resumed"):
    """All deferred memory of the workload has been received."""

    workload: str


class Recovered(Event, frozen=True, tag="recovery"):
    """Outcome of a migration that was pending recovery."""

    workload: str
    owner: str
    """`source` (the workload is on this host again) or `destination`."""
    paused: bool | None = None
    """Whether the workload is paused, because its user had paused it; None if the destination owns it."""
