"""Preparation of a workload for a checkpoint: its memory, its write traces, and its pager if memory is deferred."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from logging import getLogger
from typing import TYPE_CHECKING, Any, TypeVar

from pageferry.checkpoints.dirty_tracking import Traces, Tracking
from pageferry.checkpoints.request import Request
from pageferry.checkpoints.statistics import Statistics
from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread, on_thread
from pageferry.memory.regions import Placed
from pageferry.memory.view import Memory, Readable
from pageferry.workloads import deferred_access
from pageferry.workloads.deferred_access import AcquiredPager, wait_complete
from pageferry.workloads.direct_io import Drains, registered_buffers
from pageferry.workloads.protocols import Live

if TYPE_CHECKING:  # imported for clones only
    from pageferry.checkpoints.clone_tracking import CloneTracking
    from pageferry.pager.base_records import CloneRecord

T = TypeVar("T")

log = getLogger(__name__)


class Preparation:
    """Resources that a checkpoint requires of its workload, from `set_up` to `close`."""

    def __init__(self, request: Request, statistics: Statistics) -> None:
        self.request = request
        self.options = request.options
        """Options in effect. Unlike in the request, the mode is `stop` if buffers are registered with io_uring."""
        self.statistics = statistics
        self.hold: AcquiredPager | None = None
        """Acquired pager of a workload with deferred memory; None if no memory is deferred, and for a clone."""
        self.large: list[list[bool]] = []
        """Whether each 2 MiB unit is backed by a huge page, for each region."""
        self.present = 0
        """Present memory, bytes."""
        self._memory: Readable | None = None
        self._tracking: Tracking | CloneTracking | None = None

    async def set_up(self) -> None:
        """Open the memory, and take over the trace since the parent. `close` must be called even after an error."""
        if (live := self.request.workload.live) is not None and self.request.clone is not None:
            await self._set_up_clone(live, self.request.clone)
        elif live is not None:
            await self._set_up_live(live)
        else:
            self._memory = self.request.workload.open_memory()
        self.statistics.memory = self.memory.size
        self.large = await self.engine(lambda: deferred_access.large_units(self.memory, self.hold))
        self.present = self.memory.present() if self.hold is None else self.memory.size

    async def _set_up_live(self, live: Live) -> None:
        """Open the memory of a workload that can be saved while it runs, and take over the trace since the parent."""
        pinned = await self._switch_mode_for_registered_buffers(live.regions)
        if self.options.mode == "lazy":
            self.hold = await deferred_access.acquire_uffd(live)
        else:
            await wait_complete(live, traces=False)
        self._memory = memory = Memory(live)
        await live.check_mappers()
        self.statistics.drains = Drains(live)
        self._tracking = tracking = Tracking(live, memory, self.request.parent, self.options, self.hold)
        tracking.pinned = pinned
        tracking.direct_io = await live.does_direct_io()
        await self.engine(tracking.take_up)

    async def _set_up_clone(self, live: Live, clone: CloneRecord) -> None:
        """Open the private pages of a clone. No pager is required: all other pages have the contents of the parent."""
        from pageferry.checkpoints.clone_tracking import CloneTracking
        from pageferry.workloads.clone_view import PrivateMemory

        await self._switch_mode_for_registered_buffers(clone.regions)
        parent = self.request.parent
        self._memory = memory = await self.engine(lambda: PrivateMemory(live.name, clone, parent))
        self.statistics.drains = Drains(live)
        self._tracking = CloneTracking(memory, self.options.mode)

    async def _switch_mode_for_registered_buffers(self, regions: Sequence[Placed]) -> bool:
        """Switch to mode `stop` if buffers are registered with io_uring: neither traces nor traps report writes to
        them. Return whether there are such buffers."""
        if not any(await self.engine(lambda: registered_buffers(regions))):
            return False
        self._switch_to_stop("it has registered buffers with io_uring")
        return True

    def _switch_to_stop(self, why: str) -> None:
        log.warning("%s: saving the workload while it is paused: %s", self.request.workload.name, why)
        self.options = replace(self.options, mode="stop", track=False)
        self.statistics.switch_to_stop()

    @property
    def memory(self) -> Readable:
        """Memory of the workload. Raises RuntimeError before `set_up` and after `close`."""
        if self._memory is None:
            raise RuntimeError("cannot access the memory of the workload: it is not open")
        return self._memory

    @property
    def keeps_small_mappings(self) -> bool:
        """Whether huge pages must stay mapped by PTEs after the checkpoint, because a persistent trace requires PTEs,
        or because the acquired pager maps the huge pages by PMDs when it has loaded them."""
        return self.hold is not None or (self._tracking is not None and self._tracking.leaves)

    def traces(self) -> Traces | None:
        """Return the traces for the saver; None if it uses none."""
        return self._tracking.traces() if self._tracking is not None else None

    def traced_segments(self) -> list[Any]:
        """Return the segments whose trace is used in mode `stop`: all if the trace since the parent is used, otherwise
        none."""
        traced = self._tracking is not None and self._tracking.means == "trace"
        return self.memory.segments if traced else []

    async def lose_trace(self, why: str) -> None:
        """Remove a trace that cannot be used, so that the next attempt compares with the parent, or saves a clone while
        it is paused. If the pager is acquired, release it, and wait until no memory is deferred."""
        tracking = self._tracking
        assert tracking is not None, "without traces the saver raises no LookupError"
        await self.engine(lambda: tracking.lost(why))
        if not isinstance(tracking, Tracking):
            self._switch_to_stop(why)
            return
        if self.hold is not None:
            # By now, most of the deferred memory has been loaded.
            await self._release_pager()
            await wait_complete(tracking.workload, traces=False)

    def record_trace(self) -> None:
        """Record in the statistics how pages of the parent were found."""
        if self._tracking is not None:
            self.statistics.means, self.statistics.note = self._tracking.means, self._tracking.note

    async def leave_trace(self, covers_memory: bool) -> None:
        """Leave the trace for a child of the image if it covers all memory; otherwise remove it."""
        if self._tracking is not None:
            tracking, self._tracking = self._tracking, None
            image = (self.request.id.hex(), f"{self.statistics.image.digest:016x}") if covers_memory else None
            self.statistics.tracked = await self.engine(lambda: tracking.finish(image))

    async def close(self) -> None:
        """Remove the trace unless `leave_trace` was called, release the pager, and unmap the memory. May be called
        twice."""
        tracking, self._tracking = self._tracking, None
        try:
            if tracking is not None:
                await in_thread(tracking.finish, None)
            await self._release_pager()
        finally:
            self._memory = None  # unmapped now: an exception may keep a reference to this object

    async def _release_pager(self) -> None:
        """Release the pager, which removes the trace installed with its userfaultfd."""
        if self.hold is not None:
            hold, self.hold = self.hold, None
            await in_thread(hold.release)

    async def drain(self) -> None:
        """Complete direct I/O that may have started before the trace was installed or collected. Call this before
        memory is read."""
        drains = self.statistics.drains
        assert drains is not None, "a process is saved in mode stop"
        drains.due = True
        await drains.drain_if_due()

    async def engine(self, call: Callable[[], T], cancel: Callable[[], None] | None = None) -> T:
        """Run an engine call in a thread (see `on_thread`). Raises WorkloadDied if the workload has exited,
        WorkloadError if permission is denied or the memory is in use (EBUSY)."""
        name = self.request.workload.name
        try:
            return await on_thread(call, cancel)
        except ProcessLookupError as gone:
            raise WorkloadDied(f"cannot save {name}: it exited during the checkpoint; no image was written") from gone
        except PermissionError as denied:
            raise WorkloadError(f"cannot save {name}: {denied}{self._alternative()}") from denied
        except OSError as busy:
            if busy.errno != errno.EBUSY:
                raise
            raise WorkloadError(f"cannot save {name}: {busy.strerror}") from busy

    def _alternative(self) -> str:
        """Return advice for a user without the permissions for a checkpoint of a running workload."""
        if self.options.mode != "lazy":
            return ""
        return (
            '; --mode stop (in Python mode="stop") saves it without this permission, and keeps it paused until the '
            "image is complete"
        )
