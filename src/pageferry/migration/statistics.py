"""Statistics of a migration at the source: one record that all phases fill in, and the result computed from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pageferry._engine import SendProgress
from pageferry.events import Latency
from pageferry.host.stopwatch import Stopwatch
from pageferry.memory.regions import SMALL_PAGE
from pageferry.migration import events
from pageferry.migration.options import Options
from pageferry.migration.transport import messages
from pageferry.workloads.direct_io import Drains
from pageferry.workloads.disk_copies import CopiedDisk


class Counters(NamedTuple):
    """Counters of page streams, which can be added and subtracted."""

    sent: int = 0
    """Bytes on the wire."""
    blocks: int = 0
    """Number of storage blocks."""
    data: int = 0
    """Number of pages sent with their contents."""
    zero: int = 0
    """Number of pages sent as zeros."""
    absent: int = 0
    """Number of pages that are not present."""

    @property
    def pages(self) -> int:
        """Number of pages, of all classes."""
        return self.data + self.zero + self.absent

    @property
    def covered(self) -> int:
        """Bytes of memory covered. Holes are not counted, because they take no time."""
        return (self.data + self.zero) * SMALL_PAGE

    @classmethod
    def of(cls, progress: SendProgress) -> Counters:
        """Return the counters of a sender."""
        return cls(progress.bytes, progress.blocks, progress.data, progress.zero, progress.absent)

    def since(self, before: Counters) -> Counters:
        """Return the increase since earlier counters."""
        return Counters(*(now - then for now, then in zip(self, before, strict=True)))

    def plus(self, other: Counters) -> Counters:
        """Return the sum of these counters and those of other streams."""
        return Counters(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


def megabits(sent: int, seconds: float) -> float:
    """Return the rate of `sent` bytes in `seconds` seconds, megabits per second, rounded to 0.1."""
    return round(sent * 8 / 1e6 / max(seconds, 1e-6), 1)


def milliseconds(seconds: float) -> float:
    """Convert seconds to milliseconds, rounded to the microsecond."""
    return round(seconds * 1e3, 3)


@dataclass
class MigrationStatistics:
    """Statistics of one migration. Each field is set by the phase that determines it."""

    workload: str
    """Name of the workload."""
    options: Options
    drains: Drains
    times: Stopwatch = field(default_factory=lambda: Stopwatch("setup"))
    peer: str = ""
    """Address of the destination."""
    memory: int = 0
    """Size of all regions, bytes."""
    large: Sequence[list[bool]] = ()
    """Whether each 2 MiB unit of each region is backed by a huge page at the source."""
    install_seconds: float = 0.0
    """Time for installing the write traces, seconds."""
    released_units: int = 0
    """Number of 2 MiB units unprotected as a whole."""
    collections: int = 0
    """Number of collections of the write trace."""
    transferred: Counters = field(default_factory=Counters)
    """Counters of all rounds together."""
    cpu_throttle_percentage: int = 0
    """Highest throttle percentage so far."""
    pinned: int = 0
    """Number of pages sent during the pause because they belong to buffers that stay pinned."""
    ready: messages.Ready | None = None
    stays_paused: bool = False
    """Whether the workload stays paused at the destination, because its user had paused it."""
    running: messages.Running | None = None
    postcopy_requests: int = 0
    """Number of pages that the destination has requested."""
    postcopy_pages: int = 0
    """Number of pages missing at the switch-over."""
    arrived: messages.Arrived | None = None
    """Report of the completion of post-copy; None unless the migration has switched to post-copy."""
    disks: Sequence[CopiedDisk] = ()
    """Disks that are copied."""
    disks_sent: int = 0
    """Bytes on the wire for the disks."""
    report: messages.Report | None = None
    """Report of the destination; None if it has not been received."""
    clone: events.CloneMove | None = None
    """Memory of a clone; None for any other workload."""

    def result(self) -> events.MigrationResult:
        """Return the result of the completed migration."""
        times = self.times
        return events.MigrationResult(
            status="completed",
            mode=self.options.mode,
            workload=self.workload,
            peer=self.peer,
            paused=self.stays_paused,
            total_time=times.milliseconds("total"),
            phases=times.phase_milliseconds(),
            setup_time=times.milliseconds("setup"),
            downtime=times.milliseconds("downtime"),
            downtime_parts=self._downtime(),
            transferred=self.transferred.sent,
            memory=self.memory,
            normal=self.transferred.data,
            duplicate=self.transferred.zero,
            skipped=self.transferred.absent,
            dirty_sync_count=self.collections,
            cpu_throttle_percentage=self.cpu_throttle_percentage,
            mbps=megabits(self.transferred.sent, times.seconds("total")),
            large_pages=self._large_pages(),
            populated=self._populated(),
            faults_after_resume=self._faults(),
            trace=self._trace(),
            direct_io=self._direct_io(),
            postcopy_requests=self.postcopy_requests,
            postcopy=self._postcopy(),
            disks=[events.DiskCopy(name=disk.name, path=disk.path, size=disk.size) for disk in self.disks],
            disks_transferred=self.disks_sent,
            clone=self.clone,
        )

    def _downtime(self) -> events.Downtime:
        times, ready, running = self.times, self.ready, self.running
        assert ready is not None
        assert running is not None
        return events.Downtime(
            total=times.milliseconds("downtime"),
            stop=times.milliseconds("stop"),
            last_pages=times.milliseconds("last pages"),
            device_state=milliseconds(times.seconds("save") + ready.load),
            populate=milliseconds(ready.populate),
            resume=milliseconds(running.resume),
            disks=times.milliseconds("disks"),
        )

    def _large_pages(self) -> events.LargePageCount:
        return events.LargePageCount(
            source=sum(map(sum, self.large)),
            destination=self.report.large_pages if self.report else 0,
            fallbacks=self.report.fallbacks if self.report else 0,
        )

    def _populated(self) -> events.PopulateCount:
        source = self.report or self.ready
        assert source is not None
        populated = source.populated
        return events.PopulateCount(
            mode=self.options.populate,
            large=populated.large,
            small=populated.small,
            failed=populated.failed,
            work_ms=milliseconds(populated.seconds),
        )

    def _faults(self) -> events.FaultCount | None:
        if (report := self.report) is None:
            return None
        return events.FaultCount(minor=report.minor_faults, major=report.major_faults)

    def _trace(self) -> events.TraceCount:
        return events.TraceCount(
            granularity=self.options.trace_granularity,
            install_ms=milliseconds(self.install_seconds),
            released_units=self.released_units,
        )

    def _direct_io(self) -> events.DirectIo:
        return events.DirectIo(
            drains=self.drains.count,
            time=milliseconds(self.drains.seconds),
            longest=milliseconds(self.drains.longest),
            pinned_pages=self.pinned,
        )

    def _postcopy(self) -> events.PostcopyCount | None:
        if (arrived := self.arrived) is None:
            return None
        return events.PostcopyCount(
            time=self.times.milliseconds("postcopy"),
            pages=self.postcopy_pages,
            faults=arrived.requests,
            service_us=round(arrived.service / max(arrived.requests, 1) * 1e6, 1),
            waits=Latency.of(arrived.waits, round(arrived.longest * 1e6, 1)),
        )
