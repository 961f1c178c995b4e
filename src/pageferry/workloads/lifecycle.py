"""Life cycle of a workload of this process: one controller at a time may pause, commit, resume and discard it.

A *controller* is the client that migrates or checkpoints the workload: code of this process, or a process that is
connected to the control socket. ::

               pause                     commit
    running ──────────▶ paused ───────────────────▶ committed ── discard ──▶ moved
       ▲   resume, or      │   ▲                        │
       └───the controller──┘   └── initial if received  │  resume (by the controller,
       ▲   is lost                                      │  or by another once it is lost)
       └────────────────────────────────────────────────┘

Invariant: until `commit`, this process owns the workload. The workload therefore continues if its controller exits or
disconnects. From `commit` on, the workload may be running at the destination, and stays paused if its controller is
lost. Only a controller that knows the outcome of the migration may then `resume` or `discard` it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeVar

from pageferry._engine import Pager
from pageferry.errors import WorkloadError
from pageferry.host import forks
from pageferry.host.blocking import CALLER, blocking_loop, in_thread
from pageferry.host.workers import Workers
from pageferry.memory.mappers import Sharing
from pageferry.memory.regions import Identity, Region
from pageferry.workloads.access_page import Access, AccessPage
from pageferry.workloads.direct_io import pause_briefly
from pageferry.workloads.handle import Handle
from pageferry.workloads.program import ProgramWorkload
from pageferry.workloads.protocols import Condition, Faults, OwnershipRecord

T = TypeVar("T")


class Status(StrEnum):
    """Status of a workload."""

    RUNNING = "running"
    PAUSED = "paused"
    COMMITTED = "committed"
    MOVED = "moved"


_ACCESS = {Status.RUNNING: Access.OPEN, Status.PAUSED: Access.PAUSED}


class MemoryVersion(NamedTuple):
    """Version of the memory of a workload. If it changes after an operation has started, the operation fails."""

    resizes: int
    """Number of times that the memory was extended."""
    mark: int
    """Mark of the last process that has mapped the memory (see `access_page`)."""


class Controlled(Protocol):
    """Workload of this process, as used by `Lifecycle`. Its methods are synchronous, and called one at a time in one
    thread."""

    name: str

    @property
    def access(self) -> AccessPage:
        """Page by which processes that map the memory are found, and wait while the workload is paused."""

    @property
    def registered(self) -> bool:
        """Whether the workload is registered under its name on this host. Only registered names are unique."""

    @property
    def identity(self) -> Identity:
        """See `Migratable`."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """See `Migratable`."""

    @property
    def pager(self) -> Pager | None:
        """See `LocalWorkload`."""

    @property
    def direct_io(self) -> bool:
        """Whether direct I/O into the memory is possible, and `pause` waits for it."""

    @property
    def sharing(self) -> Sharing:
        """Ways in which other processes may have received the memory."""

    def observed_by(self, pid: int) -> None:
        """Record a pageferry process that receives a descriptor of the memory."""

    def attached_by(self, pid: int) -> Handle:
        """Return a handle for a process that attaches the memory, and thus may write to it."""

    def check_mappers(self, regions: Sequence[Region]) -> None:
        """See `Migratable`."""

    def pause(self) -> None:
        """See `Migratable`."""

    def resume(self) -> None:
        """See `Migratable`."""

    def cancel(self) -> None:
        """Cancel the running callback if it is a coroutine; a plain callback cannot be cancelled."""

    def save_state(self) -> bytes:
        """See `Migratable`."""

    def load_state(self, state: bytes) -> None:
        """See `Migratable`."""

    def discard(self) -> None:
        """See `Migratable`."""

    def faults(self) -> Faults:
        """See `Migratable`."""

    def report(self) -> dict[str, object]:
        """Return data that the workload reports about itself, for display and for benchmarks."""


class Lifecycle:
    """Life cycle of one workload. It permits one controller at a time, and ensures that the workload has exactly one
    owner.

    Calls may come from any thread. Each raises WorkloadError if the status does not permit it, or if the workload has
    another controller. A call that would not change the status does nothing. All calls but `resize` run in one thread
    of the lifecycle, so that a lock that a callback acquires (a reentrant lock) can be released by a later callback.
    """

    def __init__(self, workload: Controlled, received: bool = False) -> None:
        self.workload = workload
        self._page = workload.access
        self.thread = Workers("pageferry-callbacks", 1)
        self._enter(Status.PAUSED if received else Status.RUNNING)
        self._controller: object | None = None
        self._changing = forks.Lock()
        """Lock that is held while the memory is extended, and while the status `running` ends, but not during
        callbacks."""
        self._resizes = 0

    @property
    def status(self) -> Status:
        """Current status; other threads may change it at any time."""
        return self._status

    def pause(self, controller: object) -> None:
        """Pause the workload, until this controller calls `resume` or `discard`, or is lost."""
        self._run(lambda: self._paused(controller))

    def resume(self, controller: object) -> None:
        """Resume the workload."""
        self._run(lambda: self._resumed(controller))

    def resize(self, grow: Callable[[], object]) -> None:
        """Extend the memory of the running workload by calling `grow`.

        The call does not wait for a callback that pauses the workload, because that callback may wait for the lock that
        the calling thread holds. The controller then finds the memory extended, and fails.
        """
        with self._changing:
            self._check(None, "resized", Status.RUNNING)
            grow()
            self._resizes += 1

    @property
    def memory_version(self) -> MemoryVersion:
        """Current version of the memory. A controller reads it before the regions."""
        return MemoryVersion(self._resizes, self._page.mark)

    def check_mappers(self, version: MemoryVersion) -> None:
        """Raise WorkloadError if another process has mapped the memory since a version."""
        if self._page.mark != version.mark:
            raise WorkloadError(
                f"cannot trace {self.workload.name}: another process mapped the memory during the operation, so that "
                "writes may be missing from the trace; retry now that the memory is mapped"
            )

    def save_state(self, controller: object, version: MemoryVersion | None = None) -> bytes:
        """Return the state of the paused workload. `version`: version of the memory when the controller read the
        regions. Raises WorkloadError if the memory has since been resized, or mapped by another process."""
        return self._run(lambda: self._saved(controller, version))

    def load_state(self, controller: object, state: bytes) -> None:
        """Load a state into the paused workload."""
        self._run(lambda: self._loaded(controller, state))

    def commit(self, controller: object) -> None:
        """Commit the paused workload: from now on, it may be running at the destination."""
        self._run(lambda: self._committed(controller))

    def discard(self, controller: object) -> None:
        """End a workload that runs at the destination, or that was received and has never run."""
        self._run(lambda: self._discarded(controller))

    def lost(self, controller: object) -> None:
        """Record that the controller is permanently lost, and resume its workload unless the workload is committed."""
        self._run(lambda: self._lost(controller))

    def abandon(self, controller: object) -> None:
        """Do the same as `lost`, but return at once. Cancel the running callback if it is a coroutine."""
        self.workload.cancel()
        self.thread.submit(lambda: self._lost(controller))

    def _run(self, call: Callable[[], T]) -> T:
        if self.thread.within():
            return call()
        with blocking_loop():
            return self.thread.submit(call).result()

    # -- run in the thread of the lifecycle

    def _paused(self, controller: object) -> None:
        self._check(controller, "paused", Status.RUNNING, Status.PAUSED)
        if self._status is Status.RUNNING:
            self._pause()
        with self._changing:
            self._enter(Status.PAUSED)
            self._controller = controller

    def _resumed(self, controller: object) -> None:
        self._check(controller, "resumed", Status.RUNNING, Status.PAUSED, Status.COMMITTED)
        if self._status is not Status.RUNNING:
            self.workload.resume()
        self._enter(Status.RUNNING)
        self._controller = None

    def _saved(self, controller: object, version: MemoryVersion | None) -> bytes:
        self._check(controller, "asked for its state", Status.PAUSED, Status.COMMITTED)
        if version is not None:
            self.check_mappers(version)
        if version is not None and version.resizes != self._resizes:
            raise WorkloadError(
                f"cannot save {self.workload.name}: it was resized during the operation, and its new memory is "
                "missing; retry"
            )
        return self.workload.save_state()

    def _loaded(self, controller: object, state: bytes) -> None:
        self._check(controller, "given a state", Status.PAUSED)
        self.workload.load_state(state)

    def _committed(self, controller: object) -> None:
        self._check(controller, "committed", Status.PAUSED, Status.COMMITTED)
        self._enter(Status.COMMITTED)
        self._controller = controller

    def _discarded(self, controller: object) -> None:
        self._check(controller, "discarded", Status.PAUSED, Status.COMMITTED, Status.MOVED)
        if self._status is not Status.MOVED:
            self._enter(Status.MOVED)
            self.workload.discard()
        self._controller = None

    def _lost(self, controller: object) -> None:
        if self._controller is controller:
            self._controller = None
            if self._status is Status.PAUSED:
                self._resumed(None)

    def _enter(self, status: Status) -> None:
        """Change the status, and permit or prevent mappings of the memory by other processes."""
        self._status = status
        self._page.set(_ACCESS.get(status, Access.CLOSED))

    def _pause(self) -> None:
        try:
            self.workload.pause()
        except BaseException:
            self.workload.resume()
            raise

    def _check(self, controller: object, done: str, *fitting: Status) -> None:
        if self._status not in fitting:
            raise WorkloadError(f"cannot use {self.workload.name}: it is {self._status} and cannot be {done}")
        if self._controller not in (None, controller):
            raise WorkloadError(
                f"cannot use {self.workload.name}: it is {self._status} by another migration or checkpoint; retry when "
                "that has finished"
            )


class LocalWorkload(ProgramWorkload):
    """`Migratable` of this process. Its calls run in the thread of the lifecycle, and do not block the event loop."""

    def __init__(self, lifecycle: Lifecycle, memory: object = None) -> None:
        """Become a controller of a workload. `memory`: owner of the memory, kept alive as long as this object."""
        self._lifecycle = lifecycle
        self._memory = memory
        self._abandoned = False
        """Whether a call was cancelled. The workload then resumes as soon as its callback has returned."""
        self.name = lifecycle.workload.name
        self._version = lifecycle.memory_version
        self.regions = lifecycle.workload.regions

    @property
    def pid(self) -> int:
        """Process id of this process."""
        return os.getpid()

    @property
    def registered(self) -> bool:
        """Whether the workload is registered under its name on this host."""
        return self._lifecycle.workload.registered

    @property
    def identity(self) -> Identity:
        """Kind, name and details of the workload."""
        return self._lifecycle.workload.identity

    @property
    def pager(self) -> Pager | None:
        """Pager of this process that loads the contents; None if all contents were present from the start."""
        return self._lifecycle.workload.pager

    @property
    def handed_out(self) -> bool:
        """Whether the program has obtained the descriptor of the memory."""
        return self._lifecycle.workload.sharing.handed_out

    async def condition(self) -> Condition:
        """Return the status of the lifecycle."""
        return Condition(str(self._lifecycle.status))

    def check_migratable(self) -> None:
        """Do nothing: only pageferry manages this workload."""

    async def check_mappers(self) -> None:
        """See `Migratable`."""
        await in_thread(lambda: self._lifecycle.workload.check_mappers(self.regions))
        self._lifecycle.check_mappers(self._version)

    async def prepare_pause(self) -> None:
        """Start the thread of the callbacks."""
        await self._run(lambda: None)

    async def does_direct_io(self) -> bool:
        """Return whether the program may do direct I/O that a pause callback can wait for; False if there is no pause
        callback."""
        return self._lifecycle.workload.direct_io

    async def drain(self) -> float | None:
        """Run the pause and resume callbacks of the workload, unless it does no direct I/O."""
        if self._lifecycle.status is not Status.RUNNING or not self._lifecycle.workload.direct_io:
            return None
        return await pause_briefly(self)

    async def pause(self) -> None:
        """Run the pause callback. If it raises, run the resume callback, and raise the same exception."""
        self._abandoned = False
        await self._cancellable(lambda: self._lifecycle.pause(self))

    async def resume(self) -> None:
        """Run the resume callback of the workload."""
        if not self._abandoned:
            await self._run(lambda: self._lifecycle.resume(self))

    async def save_state(self) -> bytes:
        """Return the result of the state callback of the workload."""
        return await self._cancellable(lambda: self._lifecycle.save_state(self, self._version))

    async def commit(self, record: OwnershipRecord | None = None) -> None:
        """Leave the workload paused until `resume` or `discard`, even if this object is deleted.

        `record` is not used: the workload ends with this process.
        """
        await self._run(lambda: self._lifecycle.commit(self))

    async def load_state(self, state: bytes) -> None:
        """Pass the state to the state callback of the workload."""
        await self._cancellable(lambda: self._lifecycle.load_state(self, state))

    async def discard(self) -> None:
        """End a workload that runs at the destination, or was received and never ran."""
        if self._abandoned:  # a callback may still run: do not wait for it
            self._lifecycle.thread.submit(lambda: self._lifecycle.discard(self))
        else:
            await self._run(lambda: self._lifecycle.discard(self))

    async def running(self) -> bool:
        """Return whether the workload runs. The method never raises WorkloadDied, because the workload ends with this
        process."""
        return self._lifecycle.status is Status.RUNNING

    def faults(self) -> Faults:
        """Return the page-fault counts of the workload's own threads."""
        return self._lifecycle.workload.faults()

    def report(self) -> dict[str, object]:
        """Return data that the workload reports about itself."""
        return self._lifecycle.workload.report()

    def close(self) -> None:
        """Stop being a controller: a workload that is paused and not committed is resumed."""
        if not self._abandoned:
            self._lifecycle.lost(self)

    async def _run(self, call: Callable[[], T]) -> T:
        if CALLER.get() is None:
            CALLER.set(asyncio.get_running_loop())
        return await asyncio.wrap_future(self._lifecycle.thread.submit(call))

    async def _cancellable(self, call: Callable[[], T]) -> T:
        """Run a call that invokes a callback of the program. On cancellation, do not wait for the callback, which may
        hang."""
        try:
            return await self._run(call)
        except asyncio.CancelledError:
            self._abandoned = True
            self._lifecycle.abandon(self)
            raise
