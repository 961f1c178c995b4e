"""Phases and statistics of one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from pageferry._engine import SaveCounters, SaveFinished, Saver
from pageferry.checkpoints import events
from pageferry.checkpoints.dirty_tracking import Means
from pageferry.checkpoints.options import Mode
from pageferry.checkpoints.request import Request
from pageferry.checkpoints.rounds import Rounds
from pageferry.host.stopwatch import Stopwatch
from pageferry.memory.regions import SMALL_PAGE
from pageferry.workloads.direct_io import Drains
from pageferry.workloads.protocols import SavedDisk


class Phase(StrEnum):
    """Phase of a checkpoint."""

    SET_UP = "set-up"
    ARM = "arm"
    """Protection of the memory, and rounds."""
    STOP = "stop"
    DISKS = "disks"
    """Freezing of the disks, or the start of their copies."""
    STATE = "state"
    PROTECT = "protect"
    RESUME = "resume"
    SAVE = "save"
    PUBLISH = "publish"
    """Restoration of huge mappings, and publication of the image."""
    UPLOAD = "upload"
    """Upload of the rest of an image to a store, and its publication."""
    PUBLISHED = "published"


_ATTEMPT: dict[Mode, tuple[Phase, ...]] = {
    "lazy": (Phase.ARM, Phase.STOP, Phase.DISKS, Phase.STATE, Phase.PROTECT, Phase.RESUME, Phase.SAVE, Phase.PUBLISH),
    "stop": (Phase.STOP, Phase.DISKS, Phase.STATE, Phase.ARM, Phase.SAVE, Phase.RESUME, Phase.PUBLISH),
}
"""Phases of one attempt in their order, by mode."""

_DOWNTIME: dict[Mode, tuple[Phase, ...]] = {
    "lazy": (Phase.STOP, Phase.DISKS, Phase.STATE, Phase.PROTECT, Phase.RESUME),
    "stop": (Phase.STOP, Phase.DISKS, Phase.STATE, Phase.ARM, Phase.SAVE, Phase.RESUME),
}
"""Phases in which the workload is paused, by mode."""


class Statistics:
    """Phase of a checkpoint, the time of each phase, and the statistics that its phases record.

    The phases of an attempt follow each other in the order of its mode. A failed attempt enters RESUME if the workload
    is paused, and then PUBLISH. Another attempt can follow PUBLISH. The disks of a guest are prepared in the phase
    before ARM or STOP.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.phase = Phase.SET_UP
        self._times = Stopwatch(Phase.SET_UP.value)
        self.paused = False
        """Whether the user had paused the workload before the checkpoint."""
        self.memory = 0
        """Size of the memory, bytes."""
        self.means: Means = "none"
        self.note = ""
        self.tracked = False
        """Whether a write trace was left."""
        self.disks: Sequence[SavedDisk] = ()
        """Disks that were saved with the image."""
        self.drains: Drains | None = None
        self._armed_before_stop = 0.0
        """Time in phase ARM before the checkpoint switched to mode `stop`, in which the workload ran; milliseconds."""
        self._counters: SaveCounters | None = None
        self._finished: SaveFinished | None = None
        self.rounds = 0
        """Number of rounds before the snapshot point."""
        self.arm_seconds = 0.0
        """Time to protect all memory and to save in rounds."""

    def switch_to_stop(self) -> None:
        """Continue in mode `stop`, after an attempt or before the first one."""
        self.mode = "stop"
        self._armed_before_stop = self._milliseconds(Phase.ARM)

    @property
    def in_attempt(self) -> bool:
        """Whether a phase of the current attempt was entered."""
        return self.phase not in (Phase.SET_UP, Phase.PUBLISH)

    def enter(self, phase: Phase, at: float | None = None) -> None:
        """End the current phase and begin this one, now or at an earlier time of `time.perf_counter`.

        Raises RuntimeError if `phase` cannot follow the current phase.
        """
        if phase not in self._following():
            raise RuntimeError(f"cannot enter checkpoint phase {phase}: it cannot follow phase {self.phase}")
        self.phase = phase
        if phase is Phase.PUBLISHED:
            self._times.stop_all()
        else:
            self._times.phase(phase.value, at)

    def _following(self) -> set[Phase]:
        attempt = _ATTEMPT[self.mode]
        if self.phase is Phase.PUBLISHED:
            return set()
        if self.phase is Phase.SET_UP:
            return {attempt[0], Phase.PUBLISH}
        if self.phase is Phase.PUBLISH:
            return {attempt[0], Phase.UPLOAD, Phase.PUBLISHED}
        if self.phase is Phase.UPLOAD:
            return {Phase.PUBLISHED}
        return {attempt[attempt.index(self.phase) + 1], Phase.RESUME, Phase.PUBLISH}

    @property
    def downtime(self) -> float:
        """Duration of the pause, milliseconds. The value is final when the phase after the pause has begun."""
        return sum(self._milliseconds(phase) for phase in _DOWNTIME[self.mode]) - self._armed_before_stop

    @property
    def image(self) -> SaveFinished:
        """Image that has been written, after `saved`."""
        assert self._finished is not None
        return self._finished

    def saved(self, saver: Saver, rounds: Rounds, finished: SaveFinished) -> None:
        """Record the results of a saver: its counters, the rounds, and the result of `Saver.finish`."""
        self._counters = saver.counters
        self.rounds = rounds.count
        self.arm_seconds = saver.arm_seconds + rounds.seconds
        self._finished = finished

    def result(self, request: Request) -> events.CheckpointResult:
        """Return the result of the checkpoint."""
        count, image = self._counters, self.image
        assert count is not None
        return events.CheckpointResult(
            status="completed",
            workload=request.workload.name,
            image=request.target.name,
            id=request.id.hex(),
            digest=f"{image.digest:016x}",
            parent=str(request.parent.path) if request.parent is not None else None,
            mode=self.mode,
            paused=self.paused,
            tracking=self.means,
            tracking_note=self.note,
            drains=self.drains.count if self.drains is not None else 0,
            drain_time=round(self.drains.seconds * 1e3, 3) if self.drains is not None else 0.0,
            tracked=self.tracked,
            written=count.written,
            rounds=self.rounds,
            codec=request.options.codec,
            total_time=self._times.milliseconds("total"),
            phases=self._times.phase_milliseconds(),
            arm_time=round(self.arm_seconds * 1e3, 3),
            downtime=round(self.downtime, 3),
            downtime_parts=self._downtime_parts(),
            upload=request.target.upload,
            disks=[events.SavedDiskSummary(disk.id, disk.name, disk.path, disk.overlay) for disk in self.disks],
            memory=self.memory,
            pages=events.PageCount(**{name: getattr(count, name) for name in events.PageCount.__struct_fields__}),
            bytes_written=image.length,
            writes=image.writes,
            mean_write=image.length // max(image.writes, 1),
            blocks=image.blocks,
            traps=count.traps,
            trap_details=_trap_count(count),
            compression=round(count.data * SMALL_PAGE / count.stored, 3) if count.stored else 1.0,
        )

    def _downtime_parts(self) -> events.Downtime:
        return events.Downtime(
            total=round(self.downtime, 3),
            stop=self._milliseconds(Phase.STOP),
            disks=self._milliseconds(Phase.DISKS),
            device_state=self._milliseconds(Phase.STATE),
            protect=self._milliseconds(Phase.PROTECT),
            save=self._milliseconds(Phase.SAVE) if self.mode == "stop" else 0.0,
            resume=self._milliseconds(Phase.RESUME),
        )

    def _milliseconds(self, phase: Phase) -> float:
        return round(self._times.phases.get(phase.value, 0.0) * 1e3, 3)


def _trap_count(count: SaveCounters) -> events.TrapCount:
    return events.TrapCount(
        before=count.early_traps,
        longest_us=count.longest_trap / 1e3,
        mean_us=count.trap_time / 1e3 / max(count.traps, 1),
        staging_waits=count.staging_waits,
    )
