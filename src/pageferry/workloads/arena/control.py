"""Arena as controlled by its `Lifecycle`: callbacks of the program, processes that map the arena, and page faults."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

from pageferry._engine import Pager
from pageferry.errors import WorkloadError
from pageferry.host import proc
from pageferry.memory import mappers
from pageferry.memory.mappers import threads
from pageferry.memory.regions import SMALL_PAGE, Identity, Region, Segment
from pageferry.workloads import callbacks
from pageferry.workloads.access_page import AccessPage
from pageferry.workloads.arena.options import ArenaOptions
from pageferry.workloads.callbacks import Callback, Callbacks, Plain
from pageferry.workloads.handle import Handle
from pageferry.workloads.protocols import Faults


class ArenaMemory(Protocol):
    """Memory of an arena, and the received state of its program."""

    pager: Pager | None
    received_state: bytes | None

    @property
    def name(self) -> str | None:
        """Name on this host; None without one."""

    @property
    def address(self) -> int:
        """Address of the memory in this process."""

    @property
    def length(self) -> int:
        """Size of the memory, bytes."""

    @property
    def descriptor(self) -> int:
        """Descriptor of the memory."""

    @property
    def handed_out(self) -> bool:
        """Whether the program has obtained a descriptor of the memory."""

    @property
    def access(self) -> AccessPage:
        """Page by which processes that map the memory are found."""

    def handle(self) -> Handle:
        """Return a handle of the memory, which then counts as handed out."""

    def pagers(self) -> list[int]:
        """Return the ids of the processes that may load contents of the memory."""

    def close_memory(self) -> None:
        """Write-protect the memory in this process, because later writes would be lost."""


class ArenaControl:
    """Runner of an arena's callbacks; see `Controlled` for its methods. Other modules of pageferry may replace its
    attributes."""

    def __init__(
        self,
        arena: ArenaMemory,
        options: ArenaOptions,
        *,
        has_run: bool,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        for name in ("on_pause", "on_resume", "on_moved"):
            if (callback := getattr(options, name)) is not None:
                callbacks.check(name, callback, gate=name == "on_pause")
        self.name = "arena"
        self.details: dict[str, str | int | bool] = {}
        self.on_pause: Callback | None = options.on_pause
        self.on_resume: Plain | None = options.on_resume
        self.on_moved: Plain | None = options.on_moved
        self.on_abandoned: Plain | None = None
        """Callback that replaces `on_moved` for a received arena that has never run in this program."""
        self.has_run = has_run
        self.does_direct_io = options.direct_io
        """Whether the program may have the kernel or a device write to the arena through pinned pages (O_DIRECT)."""
        state = options.state_callbacks or (self._received_state, self._keep_state)
        self.save: Callable[[], object] = state[0]
        self.load: Callable[[bytes], object] = state[1]
        self.threads: Callable[[], dict[int, list[int]]] = self._all_threads
        self.report: Callable[[], dict[str, object]] = dict
        self.moved: Callable[[], object] = lambda: None
        """Internal function that is called after `on_moved` or `on_abandoned`."""
        self._reference = weakref.ref(arena)
        self._callbacks = Callbacks(loop)
        self._observers: set[tuple[int, int]] = set()
        """Pageferry processes that received a descriptor of the memory, as pairs of process id and start time."""

    @property
    def _arena(self) -> ArenaMemory:
        """Arena of this object. This object has only a weak reference, so that an arena is freed as soon as its program
        drops it; callers hold a strong one."""
        arena = self._reference()
        assert arena is not None
        return arena

    @property
    def access(self) -> AccessPage:
        """See `Controlled`."""
        return self._arena.access

    @property
    def registered(self) -> bool:
        """Whether the arena has been given a name."""
        return self._arena.name is not None

    @property
    def identity(self) -> Identity:
        """Identity of the arena, with its name and details."""
        return Identity("arena", self.name, self.details)

    @property
    def regions(self) -> tuple[Region, ...]:
        """Single region of the arena, with a segment for each process that maps it now."""
        arena = self._arena
        arena.access.trace(arena.length)
        own = Segment(os.getpid(), arena.address, arena.length, 0)
        found = mappers.find(arena.descriptor, arena.length, self.sharing)
        return (Region("arena", arena.length, arena.descriptor, 0, SMALL_PAGE, (own, *found.segments)),)

    @property
    def sharing(self) -> mappers.Sharing:
        """Ways in which other processes may have received the memory."""
        # A pager that has loaded all contents removes its record, but maps the memory until it exits.
        for pager in self._arena.pagers():
            self.observed_by(pager)
        observers = tuple(pid for pid, started in self._observers if proc.is_alive(pid, started))
        return mappers.Sharing(self._arena.handed_out, observers)

    def observed_by(self, pid: int) -> None:
        """Record a pageferry process that receives a descriptor of the memory."""
        started = proc.start_time(pid)
        if started is not None:
            self._observers.add((pid, started))

    def attached_by(self, pid: int) -> Handle:
        """Return a handle for a process that attaches the memory, and thus may write to it."""
        self._observers = {one for one in self._observers if one[0] != pid}
        return self._arena.handle()

    def check_mappers(self, regions: Sequence[Region]) -> None:
        """Raise WorkloadError if a process that is not in `regions` can write to the memory, UnsupportedError if the
        processes cannot be inspected."""
        sharing = self.sharing
        # The arena may have grown since the regions were read. The new memory is not part of the operation.
        length = max((region.length for region in regions), default=self._arena.length)
        found = mappers.find(self._arena.descriptor, length, sharing)
        mappers.check(self.name, found, sharing)
        mappers.check_again(self.name, [segment for region in regions for segment in region.segments], found)

    @property
    def pager(self) -> Pager | None:
        """Pager of an arena that was restored from an image; None otherwise."""
        return self._arena.pager

    @property
    def direct_io(self) -> bool:
        """Whether direct I/O is possible, and the program has a callback that waits for it."""
        return self.does_direct_io and self.on_pause is not None

    @property
    def has_loop(self) -> bool:
        """Whether an event loop of the program is known."""
        return self._callbacks.loop is not None

    @property
    def needs_loop(self) -> str | None:
        """Name of a callback that requires an event loop, if no event loop is known; otherwise None."""
        if self.has_loop:
            return None
        known: list[tuple[str, object]] = [("on_pause", self.on_pause), ("on_resume", self.on_resume)]
        known += [("on_moved", self.on_moved), ("state", self.save), ("state", self.load)]
        return next((name for name, callback in known if callbacks.needs_loop(callback)), None)

    @property
    def keeps_lock(self) -> bool:
        """Whether `on_pause` acquires a lock of `threading` that is never released after a migration."""
        return self.on_moved is None and callbacks.acquires_lock(self.on_pause)

    def pause(self) -> None:
        """Call `on_pause`, or enter it if it is a context manager."""
        if self.on_pause is not None:
            self._callbacks.enter("on_pause", self.on_pause)

    def resume(self) -> None:
        """Call `on_resume`, then exit `on_pause` if it is a context manager."""
        self.has_run = True
        if self.on_resume is not None:
            self._callbacks.call("on_resume", self.on_resume)
        self._callbacks.exit()

    def cancel(self) -> None:
        """Cancel the running callback if it is a coroutine."""
        self._callbacks.cancel()

    def save_state(self) -> bytes:
        """Call the callback that saves the state. Raises WorkloadError if it does not return bytes."""
        state: object = self._callbacks.call("save of state", self.save)
        if not isinstance(state, bytes | bytearray | memoryview):
            kind = type(state).__name__
            raise WorkloadError(f"cannot save the state of {self.name}: its callback returned {kind} instead of bytes")
        return bytes(state)

    def load_state(self, state: bytes) -> None:
        """Call the callback that loads the state. Without a callback, keep the state for the program
        (`received_state`)."""
        self._callbacks.call("load of state", self.load, state)

    def discard(self) -> None:
        """Call `on_moved` if the arena has run in this program, otherwise `on_abandoned`. Then exit `on_pause` if it is
        a context manager.

        If the arena has run, first write-protect the memory, because later writes would be lost.
        """
        if self.has_run:
            self._arena.close_memory()
        callback = self.on_moved if self.has_run else self.on_abandoned
        try:
            if callback is not None:
                self._callbacks.call("on_moved", callback)
        finally:
            self.moved()
            self._callbacks.exit()

    def faults(self) -> Faults:
        """Return the page faults of all processes that map the arena, without those of pageferry's threads."""
        minor = major = 0
        for pid, thread_ids in self.threads().items():
            more = proc.thread_faults(pid, thread_ids)
            minor, major = minor + more[0], major + more[1]
        return Faults(minor, major)

    def _received_state(self) -> bytes:
        return self._arena.received_state or b""

    def _keep_state(self, state: bytes) -> None:
        self._arena.received_state = state

    def _all_threads(self) -> dict[int, list[int]]:
        ours = {thread.native_id for thread in threading.enumerate() if thread.name.startswith("pageferry-")}
        pids = {segment.pid for region in self.regions for segment in region.segments}
        found = {pid: [thread for thread in threads(pid) if thread not in ours] for pid in pids}
        return {pid: living for pid, living in found.items() if living}
