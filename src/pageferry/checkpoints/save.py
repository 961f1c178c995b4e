"""Saves a workload while it runs (S4). `Save.run` is the whole sequence."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

from pageferry import values
from pageferry._engine import Saver
from pageferry.checkpoints import events
from pageferry.checkpoints.dirty_tracking import Means, Tracking
from pageferry.checkpoints.options import Options
from pageferry.errors import CheckpointError, UsageError, WorkloadDied, WorkloadError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import beside_loop, in_thread, on_thread, synchronous
from pageferry.host.fault_points import fault_point
from pageferry.host.stopwatch import Stopwatch
from pageferry.images import metadata
from pageferry.images.image import ImageFile, beside, new_file
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory, Readable
from pageferry.workloads import deferred_access
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.callbacks import check_listener
from pageferry.workloads.deferred_access import AcquiredPager, wait_complete
from pageferry.workloads.direct_io import Drains, registered_buffers
from pageferry.workloads.managed import saveable
from pageferry.workloads.protocols import Migratable, Saveable

PROGRESS_INTERVAL = 0.2
"""Interval of progress events, seconds."""

T = TypeVar("T")

log = getLogger(__name__)


async def checkpoint_async(
    workload: Arena | Saveable,
    path: str | Path,
    *,
    parent: str | Path | None = None,
    listener: Listener = ignore,
    **options: Any,
) -> events.CheckpointResult:
    """Save a running workload to an image at `path`; it keeps running. The image appears when it is complete.

    With `parent`, an earlier image of the same workload, only pages that differ from it are stored, and the image
    requires it. `options` are the fields of `pageferry.checkpoints.options.Options`: mode, codec, bandwidth (bytes per
    second), track, packers; in bytes trap_block, page_block, storage_block, staging, at_instant. `listener` is called
    with an event for every step.

    Raises CheckpointError if no image was written (such as for a full disk); the workload keeps running. Raises
    ImageError for a parent that cannot be used, WorkloadDied, WorkloadError, UsageError.
    """
    saveable(workload)
    if not isinstance(workload, Arena) and workload.live is None:
        options["mode"] = "stop"
    chosen = values.options(Options, options)
    target, older = values.path("path", path), values.optional(values.path, "parent", parent)
    values.function("listener", listener)
    check_listener("listener", listener)
    if isinstance(workload, Arena):
        workload.check_here()
        arena = workload
        return await beside_loop(
            lambda heard: checkpoint_async(arena.workload(), target, parent=older, listener=heard, **options), listener
        )
    save = Save(workload, target, chosen, listener)
    if older is not None:
        save.build_on(ImageFile(older))
    return await save.run()


checkpoint = synchronous(checkpoint_async)


class Save:
    """One checkpoint of one workload."""

    def __init__(self, workload: Saveable, path: Path, options: Options, listener: Listener) -> None:
        self.workload = workload
        self.path = path.absolute()
        self.options = options
        self.listener = listener
        self.id = secrets.token_bytes(16)
        self.parent: ImageFile | None = None
        self.times = Stopwatch("set-up")
        self.created = 0.0
        self.paused = False
        self.stays_paused = False
        """Whether its user had paused the workload."""
        self.hold: AcquiredPager | None = None
        """Acquired pager of a workload with deferred memory."""
        self.tracking: Tracking | None = None
        self.drains: Drains | None = None
        self.tracked = False
        self.means: Means = "none"
        self.note = ""

    def build_on(self, parent: ImageFile) -> None:
        """Store only pages that differ from `parent`. Raises UsageError if it is of another workload."""
        ours = [(region.name, region.length) for region in self.workload.regions]
        theirs = [(region.name, region.length) for region in parent.metadata.regions]
        if ours != theirs:
            raise UsageError(
                f"cannot use {parent.path} as the parent: it has regions {theirs}, {self.workload.name} has {ours}"
            )
        needed = beside(self.path, parent.path)
        if not (needed.exists() and needed.samefile(parent.path)):
            raise UsageError(
                f"cannot write {self.path}: its parent {parent.path} must be in the same directory; write to "
                f"{parent.path.parent}, or put a symbolic link to the parent into {self.path.parent}"
            )
        if self.path.exists() and any(self.path.samefile(link.path) for link in parent.links):
            raise UsageError(
                f"cannot write {self.path}: it would replace an image in the chain of its parents; use another name"
            )
        self.parent = parent

    async def run(self) -> events.CheckpointResult:
        """Save the workload. After an error it keeps running, and the unfinished image is removed."""
        if self.path.is_dir():
            raise UsageError(f"cannot write {self.path}: it is a directory; give the name of a file")
        try:
            with _writing(self.path), new_file(self.path) as file:
                finished = await self._save(file)
            self.times.stop_all()
            fault_point("checkpoint.published")
            if self.tracking is not None:
                tracking, self.tracking = self.tracking, None
                image = (self.id.hex(), f"{finished[0]:016x}") if self.saver.leaves_traces else None
                self.tracked = await self._native(lambda: tracking.finish(image))
            return self._result(*finished)
        finally:
            if self.tracking is not None:
                tracking, self.tracking = self.tracking, None
                await asyncio.shield(in_thread(tracking.finish, None))
            await asyncio.shield(self._release_pager())
            self.__dict__.pop("saver", None)  # unmaps memory now: an exception may keep a reference to this object
            self.__dict__.pop("memory", None)

    async def _save(self, file: int) -> tuple[int, int, int, int]:
        self.memory: Readable
        if (live := self.workload.live) is not None:
            await self._open_live(live)
        else:
            self.memory = self.workload.open_memory()
        self.large = await self._native(lambda: deferred_access.large_units(self.memory, self.hold))
        self.present = self.memory.present() if self.hold is None else self.memory.size
        try:
            return await self._save_once(file)
        except LookupError as lost:
            # The trace since the parent cannot be used: repeat, comparing with the parent.
            assert self.tracking is not None
            tracking, why = self.tracking, str(lost)
            await self._native(lambda: tracking.lost(why))
            if self.hold is not None:
                # By now, most of the deferred memory has been loaded.
                await self._release_pager()
                await wait_complete(tracking.workload, traces=False)
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)
            return await self._save_once(file)

    async def _open_live(self, live: Migratable) -> None:
        """Open the memory of a workload that can be saved while it runs, and take up the trace since the parent."""
        pinned = await self._heed_registered_buffers(live)
        if self.options.mode == "lazy":
            self.hold = await deferred_access.acquire_uffd(live)
        else:
            await wait_complete(live, traces=False)
        self.memory = Memory(live)
        await live.check_mappers()
        self.drains = Drains(live)
        self.tracking = Tracking(live, self.memory, self.parent, self.options, self.hold)
        self.tracking.pinned = pinned
        self.tracking.direct_io = await live.does_direct_io()
        await self._native(self.tracking.take_up)

    async def _release_pager(self) -> None:
        """Release the pager, which removes the trace installed with its userfaultfd."""
        if self.hold is not None:
            hold, self.hold = self.hold, None
            await in_thread(hold.release)

    async def _save_once(self, file: int) -> tuple[int, int, int, int]:
        await self.workload.prepare_pause()
        try:
            finished = await (self._lazily(file) if self.options.mode == "lazy" else self._stopped(file))
            if self.tracking is not None:
                self.means, self.note = self.tracking.means, self.tracking.note
            return finished
        finally:
            await asyncio.shield(self._restore_state())

    async def _lazily(self, file: int) -> tuple[int, int, int, int]:
        """Protect the memory, pause at the snapshot point, and save while the workload runs."""
        self.times.phase("arm")
        self.saver = await self._native(lambda: self._open_saver(file, self.memory.segments))
        try:
            await self._prepare()
            await self._check_mappers()
            self._report_armed()
            with self.times.measure("downtime"):
                await self._pause()
                state = await self._save_state()
                self._refuse_registered_buffers()
                self.times.phase("protect")
                with self.times.measure("protect"):
                    self.saver.begin()  # not in a thread: switching to one would take longer
                await self._resume()
            self.times.phase("save")
            fault_point("checkpoint.instant")
            self.listener(events.InstantEvent(downtime=self.times.milliseconds("downtime"), paused=self.stays_paused))
            return await self._finish(state)
        finally:
            await asyncio.shield(in_thread(self.saver.close))

    async def _stopped(self, file: int) -> tuple[int, int, int, int]:
        """Save while the workload is paused, without protecting its memory."""
        with self.times.measure("downtime"):
            await self._pause()
            state = await self._save_state()
            self.times.phase("arm")
            self.saver = await self._native(lambda: self._open_saver(file, self._traced_segments()))
            try:
                await self._native(self.saver.prepare)
                self._report_armed()
                self.times.phase("save")
                with self.times.measure("save"):
                    self.saver.begin()
                    finished = await self._finish(state)
            finally:
                await asyncio.shield(in_thread(self.saver.close))
            await self._resume()
        return finished

    def _traced_segments(self) -> list[Any]:
        """Return the segments whose trace is used: in mode stop, those of a trace that exists already."""
        traced = self.tracking is not None and self.tracking.means == "trace"
        return self.memory.segments if traced else []

    def _open_saver(self, file: int, segments: list[Any]) -> Saver:
        chosen = self.options
        return Saver(
            self.memory.contents(),
            segments,
            file,
            self.id,
            parent=self.parent.chain if self.parent is not None else None,
            codec=chosen.codec,
            page_block=chosen.page_block,
            storage_block=chosen.storage_block,
            trap_block=chosen.trap_block,
            staging=chosen.staging,
            bandwidth=chosen.bandwidth,
            packers=chosen.packers,
            max_pause_bytes=chosen.at_instant,
            traces=self.tracking.traces() if self.tracking is not None else None,
        )

    async def _prepare(self) -> None:
        """Save pages in rounds while the workload runs, if a trace reports the written ones. Deferred pages are loaded
        first."""
        hold, saver, loop = self.hold, self.saver, asyncio.get_running_loop()

        def drain() -> None:
            asyncio.run_coroutine_threadsafe(self._drain(), loop).result()

        if hold is None:
            await self._native(lambda: saver.prepare(drain=drain))
            return
        reporting = asyncio.create_task(self._report_regularly())
        try:
            await self._native(lambda: saver.prepare(_loader(hold), drain), cancel=hold.cancel)
        finally:
            reporting.cancel()

    async def _drain(self) -> None:
        """Complete direct I/O that may be older than the trace just installed or collected, before memory is read."""
        assert self.drains is not None
        self.drains.due = True
        await self.drains.drain_if_due()

    async def _heed_registered_buffers(self, live: Migratable) -> bool:
        """Switch to mode stop for a workload with registered buffers: neither traces nor traps cover writes to them."""
        regions = live.regions
        if not any(await self._native(lambda: registered_buffers(regions))):
            return False
        log.warning("%s: saving while paused: it has registered buffers with io_uring", self.workload.name)
        self.options = replace(self.options, mode="stop", track=False)
        return True

    def _refuse_registered_buffers(self) -> None:
        live = self.workload.live
        if live is not None and any(registered_buffers(live.regions)):
            raise WorkloadError(
                f"cannot save {self.workload.name}: it registered buffers with io_uring during the checkpoint; "
                "retry, or save it paused (--mode stop)"
            )

    async def _check_mappers(self) -> None:
        """Check the processes that map the memory again, after all known mappings are protected."""
        if (live := self.workload.live) is not None:
            await live.check_mappers()

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            self._report_progress()

    # -- the pause

    async def _pause(self) -> None:
        self.times.phase("stop")
        with self.times.measure("stop"):
            self.paused = True
            await self.workload.pause()

    async def _save_state(self) -> bytes:
        # Before memory is protected: saving the state may itself write to memory (devices flush their queues).
        self.times.phase("state")
        with self.times.measure("state"):
            state = await self.workload.save_state()
        self.stays_paused = self.workload.stays_paused
        self.created = time.time()
        return state

    async def _resume(self) -> None:
        self.times.phase("resume")
        with self.times.measure("resume"):
            await self.workload.resume()
            self.paused = False

    async def _restore_state(self) -> None:
        """Restore the previous state: the workload runs, on PMD mappings."""
        self.times.phase("publish")
        if self.paused:
            await self.workload.resume()
        stays = self.hold is not None or (self.tracking is not None and self.tracking.leaves)
        if self.options.mode == "lazy" and not stays:
            # Not under a persistent trace, which needs PTEs; deferred memory is mapped huge when it is loaded.
            await in_thread(self.memory.restore_large_mappings, self.large)

    # -- saving

    async def _finish(self, state: bytes) -> tuple[int, int, int, int]:
        """Save all pages, then the sections and the index."""
        self.saver.sweep()
        while not await self._native(lambda: self.saver.wait(PROGRESS_INTERVAL)):
            self._report_progress()
        self.memory.check_files()
        fault_point("checkpoint.saved")
        sections = [
            (metadata.METADATA, metadata.encode(self._metadata())),
            (metadata.STATE, state),
            (metadata.LARGE_UNITS, b"".join(map(_bits, self.large))),
        ]
        return await self._native(lambda: self.saver.finish(sections))

    def _metadata(self) -> metadata.Metadata:
        identity = self.workload.identity
        return metadata.describe(
            identity,
            self.memory.regions,
            created=self.created,
            codec=self.options.codec,
            restorable=self.workload.live is not None,
            parent=self.parent.as_parent() if self.parent is not None else None,
        )

    async def _native(self, call: Callable[[], T], cancel: Callable[[], None] | None = None) -> T:
        """Run an engine call in a thread, as `on_thread` does, with its errors translated."""
        try:
            return await on_thread(call, cancel)
        except ProcessLookupError as gone:
            raise WorkloadDied(
                f"cannot save {self.workload.name}: it ended during the checkpoint; no image was written"
            ) from gone
        except PermissionError as denied:
            raise WorkloadError(f"cannot save {self.workload.name}: {denied}{self._slower_way()}") from denied
        except OSError as busy:
            if busy.errno != errno.EBUSY:
                raise
            raise WorkloadError(f"cannot save {self.workload.name}: {busy.strerror}") from busy

    def _slower_way(self) -> str:
        """Return advice for a user without the permissions for a checkpoint of a running workload."""
        if self.options.mode != "lazy":
            return ""
        return (
            '; --mode stop (in Python mode="stop") saves it without that right, and keeps it paused until the image is '
            "complete"
        )

    # -- events

    def _report_armed(self) -> None:
        fault_point("checkpoint.armed")
        self.listener(
            events.ArmedEvent(
                memory=self.memory.size,
                present=self.present,
                large_pages=sum(map(sum, self.large)),
                arm_ms=self.saver.arm_seconds * 1e3,
            )
        )

    def _report_progress(self) -> None:
        stats = self.saver.stats
        total = self.present // SMALL_PAGE
        self.listener(
            events.SavingEvent(
                done=min(stats["pages"], total), total=total, traps=stats["traps"], stored=stats["stored"]
            )
        )

    def _result(self, digest: int, length: int, writes: int, blocks: int) -> events.CheckpointResult:
        stats = self.saver.stats
        return events.CheckpointResult(
            status="completed",
            workload=self.workload.name,
            image=str(self.path),
            id=self.id.hex(),
            digest=f"{digest:016x}",
            parent=str(self.parent.path) if self.parent is not None else None,
            mode=self.options.mode,
            paused=self.stays_paused,
            tracking=self.means,
            tracking_note=self.note,
            drains=self.drains.count if self.drains is not None else 0,
            drain_time=round(self.drains.seconds * 1e3, 3) if self.drains is not None else 0.0,
            tracked=self.tracked,
            written=stats["written"],
            rounds=stats["rounds"],
            codec=self.options.codec,
            total_time=self.times.milliseconds("total"),
            phases=self.times.phase_milliseconds(),
            arm_time=round(self.saver.arm_seconds * 1e3, 3),
            downtime=self.times.milliseconds("downtime"),
            downtime_parts=events.Downtime(
                total=self.times.milliseconds("downtime"),
                stop=self.times.milliseconds("stop"),
                device_state=self.times.milliseconds("state"),
                protect=self.times.milliseconds("protect"),
                save=self.times.milliseconds("save"),
                resume=self.times.milliseconds("resume"),
            ),
            memory=self.memory.size,
            pages=events.PageCount(**{name: stats[name] for name in events.PageCount.__struct_fields__}),
            bytes_written=length,
            writes=writes,
            mean_write=length // max(writes, 1),
            blocks=blocks,
            traps=stats["traps"],
            trap_details=events.TrapCount(
                before=stats["early_traps"],
                longest_us=stats["longest_trap"] / 1e3,
                mean_us=stats["trap_time"] / 1e3 / max(stats["traps"], 1),
                staging_waits=stats["staging_waits"],
            ),
            compression=round(stats["data"] * SMALL_PAGE / stats["stored"], 3) if stats["stored"] else 1.0,
        )


def _loader(hold: AcquiredPager) -> Callable[[int, int, int], None]:
    """Return a function that loads pages, with a fault point."""

    def load(region: int, first: int, count: int) -> None:
        hold.ensure(region, first, count)
        fault_point("checkpoint.part-brought")

    return load


def _bits(units: list[bool]) -> bytes:
    """Pack one bit per unit, least significant bit of the first byte first."""
    number = sum(1 << position for position, unit in enumerate(units) if unit)
    return number.to_bytes(-(-len(units) // 8), "little")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Translate errors of the file system."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space, or choose another file system",
            errno.EDQUOT: "the quota is exhausted",
            errno.ENOENT: "its directory does not exist",
        }.get(error.errno or 0, "the workload keeps running")
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
