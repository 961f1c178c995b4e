"""One attempt at a checkpoint: from the protection of the memory to the complete image (S4)."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from logging import getLogger
from typing import Any

from pageferry._engine import Saver
from pageferry.checkpoints import events
from pageferry.checkpoints.preparation import Preparation
from pageferry.checkpoints.rounds import Rounds
from pageferry.checkpoints.statistics import Phase
from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.fault_points import fault_point
from pageferry.images import metadata
from pageferry.memory.bitmaps import pack_units
from pageferry.memory.regions import SMALL_PAGE
from pageferry.workloads.deferred_access import AcquiredPager
from pageferry.workloads.direct_io import registered_buffers
from pageferry.workloads.events import DisksProgress
from pageferry.workloads.protocols import (
    DiskSaver,
    Live,
    SavesDisks,
    SnapshotDetails,
    pause_to_save,
    save_and_note,
    snapshot_details,
)

log = getLogger(__name__)

PROGRESS_INTERVAL = 0.2
"""Interval of progress events, seconds."""


class Attempt(ABC):
    """One attempt to save a prepared workload to an empty file."""

    def __init__(self, preparation: Preparation, file: int) -> None:
        self.preparation = preparation
        self.request = preparation.request
        self.statistics = preparation.statistics
        self.covers_memory = False
        """Whether traces cover all memory since the snapshot point."""
        self.rounds = Rounds(preparation.options.at_snapshot_point // SMALL_PAGE)
        self._file = file
        self._paused = False
        self._created = 0.0
        """Time of the snapshot point, seconds since 1970."""
        self._details = SnapshotDetails({})
        self._open_saver: Saver | None = None
        self._disks = self._disk_saver()

    async def run(self) -> None:
        """Save the workload, and restore its previous state, even after an error. Raises LookupError if the write trace
        cannot be used."""
        await self.request.workload.prepare_pause()
        try:
            if self._disks is not None:
                await self._disks.prepare()
            await self._save()
            self.preparation.record_trace()
        finally:
            await asyncio.shield(self._restore_state())

    @abstractmethod
    async def _save(self) -> None:
        """Save all memory as of the snapshot point, and complete the image."""

    async def _restore_state(self) -> None:
        """Resume the workload if it is paused, and restore the PMD mappings of its huge pages unless they must stay
        split."""
        if self._paused:
            if self.statistics.in_attempt:  # otherwise the pause itself has failed
                self.statistics.enter(Phase.RESUME)
            await self.request.workload.resume()
        self.statistics.enter(Phase.PUBLISH)
        if self.statistics.mode == "lazy" and not self.preparation.keeps_small_mappings:
            await in_thread(self.preparation.memory.restore_large_mappings, self.preparation.large)

    async def abandon(self) -> None:
        """Undo what the attempt has changed in the disks of the workload, after an error."""
        if self._disks is not None:
            await self._disks.abandon()

    def _disk_saver(self) -> DiskSaver | None:
        workload, request = self.request.workload, self.request
        if not isinstance(workload, SavesDisks):
            return None
        options = request.options
        return workload.save_disks(*options.disks, request.target.path, request.id.hex(), self._bandwidth)

    @property
    def _bandwidth(self) -> int:
        """Limit for saving memory and copying disks, bytes per second; 0 means unlimited."""
        return self.preparation.options.bandwidth

    # -- the saver

    @property
    def _saver(self) -> Saver:
        if self._open_saver is None:
            raise RuntimeError("cannot use the saver: the memory is not protected")
        return self._open_saver

    async def _arm(self, segments: list[Any]) -> None:
        """Open the saver, which write-protects the given segments."""
        self.statistics.enter(Phase.ARM)
        self._open_saver = await self.preparation.engine(lambda: self._new_saver(segments))

    def _new_saver(self, segments: list[Any]) -> Saver:
        chosen, parent = self.preparation.options, self.request.parent
        return Saver(
            self.preparation.memory.contents(),
            segments,
            self._file,
            self.request.id,
            parent=parent.chain if parent is not None else None,
            codec=chosen.codec,
            page_block=chosen.page_block,
            storage_block=chosen.storage_block,
            trap_block=chosen.trap_block,
            staging=chosen.staging,
            bandwidth=self._bandwidth,
            packers=chosen.packers,
            traces=self.preparation.traces(),
        )

    def _region_pages(self) -> list[int]:
        """Return the number of pages of each region."""
        return [region.length // SMALL_PAGE for region in self.preparation.memory.regions]

    async def _close_saver(self) -> None:
        saver, self._open_saver = self._saver, None
        await asyncio.shield(in_thread(saver.close))

    async def _complete(self, state: bytes) -> None:
        """Save all remaining pages, then the sections and the index."""
        await self._read_details()
        preparation = self.preparation
        self._saver.sweep()
        while not await preparation.engine(lambda: self._saver.wait(PROGRESS_INTERVAL)):
            self._report_progress()
        preparation.memory.check_files()
        await self._check_saved()
        await self._complete_disks()
        fault_point("checkpoint.saved")
        sections = [
            (metadata.METADATA, metadata.encode(self._metadata())),
            (metadata.STATE, state),
            (metadata.LARGE_UNITS, b"".join(map(pack_units, preparation.large))),
        ]
        finished = await preparation.engine(lambda: self._saver.finish(sections))
        self.statistics.saved(self._saver, self.rounds, finished)
        self.covers_memory = self._saver.leaves_traces

    @abstractmethod
    async def _check_saved(self) -> None:
        """Check, when all pages have been saved, that all writes since the snapshot point were trapped. Raises
        WorkloadError."""

    async def _complete_disks(self) -> None:
        if self._disks is not None:
            await self._disks.resumed()  # mode `stop`: the workload is still paused
            details = await self._disks.finish(self._details.details, self._report_disks)
            self._details = replace(self._details, details=details)
            self.statistics.disks = self._disks.saved

    async def _read_details(self) -> None:
        self._details = await snapshot_details(self.request.workload)
        if self._details.warning is not None:
            log.warning("%s: %s", self.request.workload.name, self._details.warning)

    def _metadata(self) -> metadata.Metadata:
        workload, parent = self.request.workload, self.request.parent
        identity = workload.identity
        return metadata.describe(
            replace(identity, details=identity.details | self._details.details),
            self.preparation.memory.regions,
            created=self._created,
            codec=self.preparation.options.codec,
            restorable=workload.live is not None,
            parent=parent.as_parent() if parent is not None else None,
        )

    # -- the pause

    async def _pause(self) -> bytes:
        """Pause the workload, and return its state."""
        if self._disks is not None:
            await self._disks.flush()
        self._paused = True
        self.request.target.hold()
        stopped = await pause_to_save(self.request.workload)
        self.statistics.enter(Phase.STOP, at=stopped)
        # Before the state is saved: QEMU's migration of the state deactivates all block nodes.
        self.statistics.enter(Phase.DISKS)
        if self._disks is not None:
            await self._disks.freeze()
        # The state is saved before memory is protected, because saving it may write to memory: devices flush their
        # queues.
        self.statistics.enter(Phase.STATE)
        state = await save_and_note(self.request.workload)
        self.statistics.paused = self.request.workload.stays_paused
        self._created = time.time()
        return state

    async def _resume(self) -> None:
        self.statistics.enter(Phase.RESUME)
        await self.request.workload.resume()
        self._paused = False

    # -- events

    def _report_armed(self) -> None:
        fault_point("checkpoint.armed")
        self.request.listener(
            events.ArmedEvent(
                memory=self.preparation.memory.size,
                present=self.preparation.present,
                large_pages=sum(map(sum, self.preparation.large)),
                arm_ms=(self._saver.arm_seconds + self.rounds.seconds) * 1e3,
            )
        )

    def _report_disks(self, done: int, total: int) -> None:
        self.request.listener(DisksProgress(workload=self.request.workload.name, done=done, total=total))

    def _report_progress(self) -> None:
        count, total = self._saver.counters, self.preparation.present // SMALL_PAGE
        self.request.listener(
            events.SavingEvent(done=min(count.pages, total), total=total, traps=count.traps, stored=count.stored)
        )


class LazyAttempt(Attempt):
    """Attempt that protects the memory, pauses the workload only at the snapshot point, and saves while the workload
    runs."""

    def __init__(self, preparation: Preparation, file: int, live: Live) -> None:
        super().__init__(preparation, file)
        self.live = live

    async def _save(self) -> None:
        await self._arm(self.preparation.memory.segments)
        try:
            await self._save_in_rounds()
            await self.live.check_mappers()  # repeated now that all known mappings are protected
            self._report_armed()
            state = await self._pause()
            self._refuse_registered_buffers()
            self.statistics.enter(Phase.PROTECT)
            self._saver.begin()  # in this thread: a switch of threads would prolong the pause
            await self._resume()
            self.request.target.release()
            self.statistics.enter(Phase.SAVE)
            if self._disks is not None:
                await self._disks.resumed()
            fault_point("checkpoint.instant")
            paused = self.statistics.paused
            self.request.listener(events.InstantEvent(downtime=self.statistics.downtime, paused=paused))
            await self._complete(state)
        finally:
            await self._close_saver()

    async def _check_saved(self) -> None:
        """See `Attempt`. A process that has mapped the memory since the last check may have written to it without a
        trap."""
        try:
            await self.live.check_mappers()
        except WorkloadDied as gone:
            name = self.request.workload.name
            raise WorkloadDied(f"cannot save {name}: it exited during the checkpoint; no image was written") from gone

    async def _save_in_rounds(self) -> None:
        """Save pages in rounds while the workload runs, if a trace reports the written pages. Load deferred pages
        first."""
        hold, loop, regions = self.preparation.hold, asyncio.get_running_loop(), self._region_pages()
        saver, load = self._saver, _loader(hold)

        def drain() -> None:
            asyncio.run_coroutine_threadsafe(self.preparation.drain(), loop).result()

        def cancel() -> None:
            if hold is not None:
                hold.cancel()
            saver.cancel()

        reporting = asyncio.create_task(self._report_regularly())
        try:
            await self.preparation.engine(lambda: self.rounds.run(saver, regions, drain, load), cancel)
        finally:
            reporting.cancel()

    def _refuse_registered_buffers(self) -> None:
        clone = self.request.clone
        if any(registered_buffers(self.live.regions if clone is None else clone.regions)):
            raise WorkloadError(
                f"cannot save {self.live.name}: it registered buffers with io_uring during the checkpoint; "
                "retry, or use `mode` stop"
            )

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            self._report_progress()


class StoppedAttempt(Attempt):
    """Attempt that saves while the workload is paused, without protecting its memory."""

    @property
    def _bandwidth(self) -> int:
        """Always 0, because a limit would prolong the pause."""
        return 0

    async def _save(self) -> None:
        state = await self._pause()
        self.request.target.release()  # the upload does not wait until the workload resumes
        await self._arm(self.preparation.traced_segments())
        try:
            regions = self._region_pages()
            await self.preparation.engine(lambda: self.rounds.run(self._saver, regions, _drained))
            self._report_armed()
            self.statistics.enter(Phase.SAVE)
            self._saver.begin()
            await self._complete(state)
        finally:
            await self._close_saver()
        await self._resume()

    async def _check_saved(self) -> None:
        """Do nothing: the workload is paused, and processes that map its memory wait."""


def attempt(preparation: Preparation, file: int) -> Attempt:
    """Return an attempt in the mode of the checkpoint; in mode `stop` if the workload cannot be saved while it runs."""
    live = preparation.request.workload.live
    if preparation.options.mode == "stop" or live is None:
        return StoppedAttempt(preparation, file)
    return LazyAttempt(preparation, file, live)


def _drained() -> None:
    """Do nothing: the pause has drained all direct I/O."""


def _loader(hold: AcquiredPager | None) -> Callable[[int, int, int], None]:
    """Return a function that loads deferred pages through the acquired pager. Without one, all pages are present."""

    def load(region: int, first: int, count: int) -> None:
        if hold is None:
            return
        hold.ensure(region, first, count)
        fault_point("checkpoint.part-brought")

    return load
