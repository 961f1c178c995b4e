"""An arena as its `Lifecycle` sees it: callbacks of the program, the processes that map it, their faults."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from pageferry._engine import Pager
from pageferry.errors import WorkloadError
from pageferry.host import proc
from pageferry.workloads.base import SMALL_PAGE, Faults, Identity, Region, Segment
from pageferry.workloads.control.server import THREAD_NAME
from pageferry.workloads.mappers import inherited_segments, threads

if TYPE_CHECKING:
    from pageferry.workloads.arena import Arena

Callback = Callable[[], object]


class ArenaControl:
    """Runs an arena's callbacks. Pageferry's own workloads replace its attributes; see `Controlled` for the methods."""

    def __init__(
        self,
        arena: Arena,
        on_pause: Callback | None,
        on_resume: Callback | None,
        on_moved: Callback | None,
        has_run: bool,
    ) -> None:
        self.name = "arena"
        self.details: dict[str, str | int | bool] = {}
        self.on_pause = on_pause
        self.on_resume = on_resume
        self.on_moved = on_moved
        self.on_abandoned: Callback | None = None
        """Called instead of `on_moved` when a received arena never came to run here."""
        self.has_run = has_run
        self.does_direct_io = True
        """The program may have the kernel or a device write to the arena through pages that it pins (O_DIRECT)."""
        self.save: Callable[[], bytes] = lambda: arena.received_state or b""
        self.load: Callable[[bytes], object] = self._keep_state
        self.threads: Callable[[], dict[int, list[int]]] = self._all_threads
        self.report: Callable[[], dict[str, object]] = dict
        self.moved: Callback = lambda: None
        """Called after either: the arena's own affairs."""
        self._arena = arena

    @property
    def registered(self) -> bool:
        """Whether the arena has been given a name."""
        return self._arena.name is not None

    @property
    def identity(self) -> Identity:
        """An arena of that name."""
        return Identity("arena", self.name, self.details)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The one region of an arena, and who maps it now."""
        arena = self._arena
        own = Segment(os.getpid(), arena.address, arena.length, 0)
        segments = (own, *inherited_segments(arena.descriptor, arena.length))
        return (Region("arena", arena.length, arena.descriptor, 0, SMALL_PAGE, segments),)

    @property
    def pager(self) -> Pager | None:
        """Of an arena that is restored."""
        return self._arena.pager

    @property
    def direct_io(self) -> bool:
        """Whether direct I/O is possible, and there is a callback that waits for it."""
        return self.does_direct_io and self.on_pause is not None

    def pause(self) -> None:
        """Call `on_pause`."""
        if self.on_pause is not None:
            self.on_pause()

    def resume(self) -> None:
        """Call `on_resume`."""
        self.has_run = True
        if self.on_resume is not None:
            self.on_resume()

    def save_state(self) -> bytes:
        """Call the state callback, and see that it gives bytes."""
        state: object = self.save()
        if not isinstance(state, bytes | bytearray | memoryview):
            raise WorkloadError(f"the state callback of {self.name} gave {type(state).__name__} instead of bytes")
        return bytes(state)

    def load_state(self, state: bytes) -> None:
        """Call the state callback, or keep the state for the program to look at."""
        self.load(state)

    def discard(self) -> None:
        """Call `on_moved`, if the arena has ever been this program's to run."""
        callback = self.on_moved if self.has_run else self.on_abandoned
        try:
            if callback is not None:
                callback()
        finally:
            self.moved()

    def faults(self) -> Faults:
        """Of all processes that map the arena; threads that serve the control socket are not counted."""
        minor = major = 0
        for pid, thread_ids in self.threads().items():
            more = proc.thread_faults(pid, thread_ids)
            minor, major = minor + more[0], major + more[1]
        return Faults(minor, major)

    def _keep_state(self, state: bytes) -> None:
        self._arena.received_state = state

    def _all_threads(self) -> dict[int, list[int]]:
        ours = {thread.native_id for thread in threading.enumerate() if thread.name == THREAD_NAME}
        pids = {segment.pid for region in self.regions for segment in region.segments}
        found = {pid: [thread for thread in threads(pid) if thread not in ours] for pid in pids}
        return {pid: living for pid, living in found.items() if living}
