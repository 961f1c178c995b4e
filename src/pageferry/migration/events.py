"""What a migration tells on the way and at its end. Names are those of QEMU's MigrationStats where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import msgspec

from pageferry.events import Event, Latency
from pageferry.migration.messages import Mode

Status = Literal["completed", "failed", "cancelled"]
PostcopyStatus = Literal["postcopy-active", "postcopy-paused", "postcopy-recover"]


MAX_CELLS = 1024
"""Of a map of large pages."""


class SetupEvent(Event, frozen=True, kw_only=True, tag="setup"):
    """Connected, traces installed."""

    peer: str
    memory: int
    """Bytes of all regions."""
    present: int
    """Bytes of them that are in memory."""
    large_pages: int
    install_ms: float


class LargeMap(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Where in a region large pages are: a line of cells, at most 1024 of them."""

    region: str
    length: int
    per_cell: int
    """Units of 2 MiB that a cell stands for; the last one may stand for fewer."""
    cells: list[int]
    """Large pages in each."""

    @classmethod
    def of(cls, region: str, length: int, units: Sequence[bool]) -> Self:
        """From which units are large."""
        per_cell = max(-(-len(units) // MAX_CELLS), 1)
        cells = [sum(units[start : start + per_cell]) for start in range(0, len(units), per_cell)]
        return cls(region=region, length=length, per_cell=per_cell, cells=cells)


class LargePagesEvent(Event, frozen=True, kw_only=True, tag="large-page-map"):
    """Where the workload's memory stands on large pages."""

    side: Literal["source", "destination"]
    """`source`: when the migration begins; `destination`: a second after it has ended."""
    regions: list[LargeMap]


class RoundEvent(Event, frozen=True, kw_only=True, tag="round"):
    """A round has been sent and acknowledged."""

    round: int
    pages: int
    """Pages of the round, of all classes."""
    sent: int
    """Bytes on the wire."""
    remaining: int
    """Bytes modified meanwhile, to be sent in the next round."""
    ms: float
    mbps: float
    """Megabits per second on the wire."""
    dirty_rate: int
    """Bytes of memory modified per second."""
    cpu_throttle_percentage: int = 0
    """CPU time that was taken from the workload meanwhile, per cent (auto-converge)."""
    switch_over: bool = False
    """A round just before the pause, or in it: reported when the workload runs again. What was modified after it is in
    the next round, and `remaining` is 0."""


class ProgressEvent(Event, frozen=True, kw_only=True, tag="progress"):
    """How far a round is. Sent several times a second."""

    round: int
    done: int
    total: int
    """Pages."""
    mbps: float


class PostcopyEvent(Event, frozen=True, kw_only=True, tag="postcopy"):
    """The workload runs at the destination, and its pages come; at either side. Sent several times a second."""

    status: PostcopyStatus
    remaining: int
    """Bytes whose contents are still to come."""
    postcopy_requests: int
    """Requests of the destination."""
    mbps: float
    """Megabits per second on the wire; 0 at the destination."""


class Downtime(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Where the time went in which nobody ran the workload, milliseconds. `last_pages` and `device_state` overlap."""

    total: float
    stop: float
    last_pages: float
    device_state: float
    """Saving it, and loading it at the destination."""
    populate: float
    resume: float


class LargePageCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """2 MiB pages under the workload's memory."""

    source: int
    destination: int
    fallbacks: int
    """Large pages of the source for which the destination had none."""


class PopulateCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Mappings made before the workload resumed (S1, S5)."""

    mode: str
    large: int
    small: int
    failed: int
    work_ms: float
    """Time of the prefault workers, hidden in the transfer except for `downtime.populate`."""


class FaultCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Page faults of the workload's threads in the first second at the destination."""

    minor: int
    major: int


class TraceCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """The write trace (S2)."""

    granularity: str
    install_ms: float
    released_units: int
    """2 MiB units that coarse traces released as a whole."""


class PostcopyCount(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What came after the workload had begun to run at the destination."""

    time: float
    """Milliseconds from Running until every page was there."""
    pages: int
    """Pages that were missing at the switch-over."""
    faults: int
    """Accesses that waited for a page."""
    service_us: float
    """Microseconds that they waited on average."""
    waits: Latency
    """How long they waited."""


class DirectIo(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Direct I/O of the workload: what was done so that none of its writes is missed (S2)."""

    drains: int = 0
    """Short pauses in which requests ended, while the workload ran; 0: it does no direct I/O."""
    time: float = 0.0
    """Milliseconds that the workload was paused for them."""
    longest: float = 0.0
    """Milliseconds."""
    pinned_pages: int = 0
    """Pages sent in the pause because they lie in buffers registered with io_uring."""


class MigrationResult(Event, frozen=True, kw_only=True, tag="migration"):
    """The end of a migration. Times in milliseconds, sizes in bytes."""

    status: Status
    mode: Mode
    workload: str
    peer: str
    paused: bool = False
    """Whether its user had paused the workload: it is paused at the destination."""
    total_time: float
    setup_time: float
    downtime: float
    downtime_parts: Downtime
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    """Consecutive phases, which add up to `total-time`: setup, copy, prepare (for the pause), stop, last-pages (and the
    state, saved meanwhile), load (wait until the destination is ready), hand-over (until it runs there), postcopy or
    report. Those from stop to hand-over are the downtime."""
    transferred: int
    """Bytes on the wire, control messages and state left out."""
    memory: int
    normal: int
    """Pages sent with their contents."""
    duplicate: int
    """Pages sent as zeros."""
    skipped: int
    """Pages that are not in memory."""
    dirty_sync_count: int
    """Times the trace was collected."""
    mbps: float
    large_pages: LargePageCount
    populated: PopulateCount
    faults_after_resume: FaultCount | None
    """None: the destination did not say."""
    trace: TraceCount
    direct_io: DirectIo = DirectIo()
    cpu_throttle_percentage: int = 0
    """The most CPU time that was taken from the workload while it was copied, per cent (auto-converge)."""
    postcopy_requests: int = 0
    """Pages that the destination asked for, because somebody waited for them."""
    postcopy: PostcopyCount | None = None
    """None: every page was there before it ran."""
