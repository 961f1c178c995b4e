"""Who may run a workload of this process: paused, committed and let go on behalf of one controller at a time.

A *controller* is whoever migrates or checkpoints the workload: code of this process, or a process at the other end of
the control socket. ::

               pause                     commit
    running ──────────▶ paused ───────────────────▶ committed ── discard ──▶ moved
       ▲   resume, or      │   ▲                        │
       └───the controller──┘   └── made by `received`   │  resume (by the controller,
       ▲   is lost                                      │  or by another once it is lost)
       └────────────────────────────────────────────────┘

What always holds: until `commit` the workload is ours, so a controller that dies or goes away lets it run on. From
`commit` on it may be running elsewhere, so losing the controller leaves it paused, and only somebody who knows what
became of the migration may `resume` or `discard` it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol, TypeVar

from pageferry._engine import Pager
from pageferry.errors import WorkloadError
from pageferry.host.blocking import CALLER, in_thread
from pageferry.host.workers import Workers
from pageferry.memory.mappers import Sharing
from pageferry.memory.regions import Identity, Region
from pageferry.workloads.callbacks import blocking_loop
from pageferry.workloads.direct_io import pause_briefly
from pageferry.workloads.protocols import Faults, Witness

T = TypeVar("T")


class Status(StrEnum):
    """Where a workload is in its life."""

    RUNNING = "running"
    PAUSED = "paused"
    COMMITTED = "committed"
    MOVED = "moved"


class Controlled(Protocol):
    """A workload of this process, as a `Lifecycle` needs it: plain calls, one at a time, all in one thread."""

    name: str

    @property
    def registered(self) -> bool:
        """Whether it has that name on this host: others may be called so by chance."""

    @property
    def identity(self) -> Identity:
        """As of `Workload`."""

    @property
    def regions(self) -> tuple[Region, ...]:
        """As of `Workload`."""

    @property
    def pager(self) -> Pager | None:
        """As of `LocalWorkload`."""

    @property
    def direct_io(self) -> bool:
        """Whether direct I/O into the memory is possible, and `pause` waits for it."""

    @property
    def sharing(self) -> Sharing:
        """How the memory may have come to other processes."""

    def observed_by(self, pid: int) -> None:
        """Note a process of pageferry that is given the memory."""

    def check_mappers(self, regions: Sequence[Region]) -> None:
        """As of `Workload`."""

    def pause(self) -> None:
        """As of `Workload`."""

    def resume(self) -> None:
        """As of `Workload`."""

    def cancel(self) -> None:
        """End a callback that another thread waits for, where that is possible."""

    def save_state(self) -> bytes:
        """As of `Workload`."""

    def load_state(self, state: bytes) -> None:
        """As of `Workload`."""

    def discard(self) -> None:
        """As of `Workload`."""

    def faults(self) -> Faults:
        """As of `Workload`."""

    def report(self) -> dict[str, object]:
        """What the workload has to say about itself, for people and benchmarks."""


class Lifecycle:
    """Lets one controller at a time act on a workload, and sees to it that it has exactly one owner.

    Calls may come from any thread; each raises WorkloadError when it does not fit the status, or when somebody else
    controls the workload. Calls that would change nothing do nothing. All run in one thread of the lifecycle: what a
    callback acquires there (a reentrant lock) a later callback can release.
    """

    def __init__(self, workload: Controlled, received: bool = False) -> None:
        self.workload = workload
        self.thread = Workers("pageferry-callbacks", 1)
        self._status = Status.PAUSED if received else Status.RUNNING
        self._controller: object | None = None

    @property
    def status(self) -> Status:
        """What the workload is now; may be another at once."""
        return self._status

    def pause(self, controller: object) -> None:
        """Pause the workload; it is this controller's until `resume`, `discard`, or until the controller is lost."""
        self._run(lambda: self._paused(controller))

    def resume(self, controller: object) -> None:
        """Let the workload run."""
        self._run(lambda: self._resumed(controller))

    def save_state(self, controller: object) -> bytes:
        """The state of the paused workload."""
        return self._run(lambda: self._saved(controller))

    def load_state(self, controller: object, state: bytes) -> None:
        """Give the paused workload its state."""
        self._run(lambda: self._loaded(controller, state))

    def commit(self, controller: object) -> None:
        """From here on the paused workload may be running elsewhere."""
        self._run(lambda: self._committed(controller))

    def discard(self, controller: object) -> None:
        """It runs elsewhere, or never came to run here: end it."""
        self._run(lambda: self._discarded(controller))

    def lost(self, controller: object) -> None:
        """The controller is gone for good: the workload runs on, unless it was committed."""
        self._run(lambda: self._lost(controller))

    def abandon(self, controller: object) -> None:
        """As `lost`, without waiting: callbacks that run are cancelled where that is possible, or end first."""
        self.workload.cancel()
        self.thread.submit(lambda: self._lost(controller))

    def _run(self, call: Callable[[], T]) -> T:
        if self.thread.within():
            return call()
        with blocking_loop():
            return self.thread.submit(call).result()

    # -- in the thread

    def _paused(self, controller: object) -> None:
        self._check(controller, "paused", Status.RUNNING, Status.PAUSED)
        if self._status is Status.RUNNING:
            self._pause()
        self._status = Status.PAUSED
        self._controller = controller

    def _resumed(self, controller: object) -> None:
        self._check(controller, "resumed", Status.RUNNING, Status.PAUSED, Status.COMMITTED)
        if self._status is not Status.RUNNING:
            self.workload.resume()
        self._status = Status.RUNNING
        self._controller = None

    def _saved(self, controller: object) -> bytes:
        self._check(controller, "asked for its state", Status.PAUSED, Status.COMMITTED)
        return self.workload.save_state()

    def _loaded(self, controller: object, state: bytes) -> None:
        self._check(controller, "given a state", Status.PAUSED)
        self.workload.load_state(state)

    def _committed(self, controller: object) -> None:
        self._check(controller, "committed", Status.PAUSED, Status.COMMITTED)
        self._status = Status.COMMITTED
        self._controller = controller

    def _discarded(self, controller: object) -> None:
        self._check(controller, "discarded", Status.PAUSED, Status.COMMITTED, Status.MOVED)
        if self._status is not Status.MOVED:
            self._status = Status.MOVED
            self.workload.discard()
        self._controller = None

    def _lost(self, controller: object) -> None:
        if self._controller is controller:
            self._controller = None
            if self._status is Status.PAUSED:
                self._resumed(None)

    def _pause(self) -> None:
        try:
            self.workload.pause()
        except BaseException:
            self.workload.resume()
            raise

    def _check(self, controller: object, done: str, *fitting: Status) -> None:
        if self._status not in fitting:
            raise WorkloadError(f"{self.workload.name} is {self._status} and cannot be {done}")
        if self._controller not in (None, controller):
            raise WorkloadError(
                f"{self.workload.name} is {self._status} by another migration or checkpoint; retry when that has "
                "finished"
            )


class LocalWorkload:
    """A `Workload` of this process. Its calls run in the lifecycle's thread; the event loop is not blocked by them."""

    def __init__(self, lifecycle: Lifecycle, memory: object = None) -> None:
        """`memory`: object that owns the memory; it lives at least as long as this one."""
        self._lifecycle = lifecycle
        self._memory = memory
        self._abandoned = False
        """A call was cancelled: the workload runs again as soon as its callback has ended."""
        self.name = lifecycle.workload.name
        self.regions = lifecycle.workload.regions

    @property
    def registered(self) -> bool:
        """Whether it has its name on this host."""
        return self._lifecycle.workload.registered

    @property
    def identity(self) -> Identity:
        """What this workload is."""
        return self._lifecycle.workload.identity

    @property
    def pager(self) -> Pager | None:
        """What brings its contents, in this process; None where all were there from the start."""
        return self._lifecycle.workload.pager

    @property
    def handed_out(self) -> bool:
        """Whether the program has taken the descriptor of the memory."""
        return self._lifecycle.workload.sharing.handed_out

    async def check_mappers(self) -> None:
        """As of `Workload`."""
        await in_thread(lambda: self._lifecycle.workload.check_mappers(self.regions))

    async def prepare_pause(self) -> None:
        """Start the thread for the callbacks."""
        await self._run(lambda: None)

    async def prepare_load(self) -> None:
        """Nothing: there is nobody to be told."""

    async def does_direct_io(self) -> bool:
        """As the program says; False without a pause callback, which could not wait for it."""
        return self._lifecycle.workload.direct_io

    async def drain(self) -> float | None:
        """Run the workload's pause and resume callbacks, unless it does no direct I/O."""
        if self._lifecycle.status is not Status.RUNNING or not self._lifecycle.workload.direct_io:
            return None
        return await pause_briefly(self)

    async def pause(self) -> None:
        """Run the workload's pause callback. Raises what it raises, after the resume callback."""
        self._abandoned = False
        await self._cancellable(lambda: self._lifecycle.pause(self))

    async def resume(self) -> None:
        """Run the workload's resume callback."""
        if not self._abandoned:
            await self._run(lambda: self._lifecycle.resume(self))

    async def save_state(self) -> bytes:
        """What the workload's state callback gives."""
        return await self._cancellable(lambda: self._lifecycle.save_state(self))

    async def commit(self, witness: Witness | None = None) -> None:
        """It stays paused until `resume` or `discard`, even if this object is forgotten. It cannot outlive us."""
        await self._run(lambda: self._lifecycle.commit(self))

    async def load_state(self, state: bytes) -> None:
        """Give the state to the workload's callback."""
        await self._cancellable(lambda: self._lifecycle.load_state(self, state))

    async def prefault(self, units: Mapping[int, Sequence[int]] | None = None) -> int:
        """Nothing: its threads use the page tables of their process."""
        return 0

    async def discard(self) -> None:
        """It runs elsewhere now."""
        if self._abandoned:  # a callback may still run: it is not waited for
            self._lifecycle.thread.submit(lambda: self._lifecycle.discard(self))
        else:
            await self._run(lambda: self._lifecycle.discard(self))

    async def running(self) -> bool:
        """Whether it runs; it cannot die before we do."""
        return self._lifecycle.status is Status.RUNNING

    def faults(self) -> Faults:
        """Page faults of the workload's own threads."""
        return self._lifecycle.workload.faults()

    def report(self) -> dict[str, object]:
        """What the workload says about itself."""
        return self._lifecycle.workload.report()

    def close(self) -> None:
        """Be no controller any more: a workload that is paused and not committed runs on."""
        if not self._abandoned:
            self._lifecycle.lost(self)

    async def _run(self, call: Callable[[], T]) -> T:
        if CALLER.get() is None:
            CALLER.set(asyncio.get_running_loop())
        return await asyncio.wrap_future(self._lifecycle.thread.submit(call))

    async def _cancellable(self, call: Callable[[], T]) -> T:
        """A call that runs a callback of the program. On cancellation it is not waited for: it may hang."""
        try:
            return await self._run(call)
        except asyncio.CancelledError:
            self._abandoned = True
            self._lifecycle.abandon(self)
            raise
