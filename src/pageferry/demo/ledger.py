"""Built-in workload: an arena to which threads of one or more processes write, and in which every lost write can be
detected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypedDict, Unpack

import msgspec

from pageferry import _engine
from pageferry._engine import Stalls
from pageferry.demo.shares import ChildShare, LocalShare, Share
from pageferry.errors import UsageError, WorkloadDied, WorkloadError
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.lifecycle import LocalWorkload


class LedgerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a ledger, as in `_engine._LedgerOptions`. Fractions are between 0 and 1."""

    threads: int = 1
    """Number of threads of all processes together. Each thread owns one partition of the pages."""
    seed: int = 1
    rate: int | None = None
    """Limit on the write rate of all threads together, bytes per second; None: unlimited."""
    working_set: float = 1.0
    scatter: bool = False
    skew: float = 1.0
    zero_fraction: float = 0.0
    fill: float = 1.0
    compressible: float = 0.0


class LedgerArguments(TypedDict, total=False):
    """Keyword arguments that `LedgerWorkload.create` passes to the constructor."""

    processes: int
    exact: bool
    on_moved: Callable[[], object] | None


class LedgerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """State of a paused ledger. The destination uses it to verify that it has received the same contents."""

    options: LedgerOptions
    writes: list[int]
    """Number of writes to each partition."""
    fingerprint: int
    """Fingerprint of the header and the counters, which determine the table. If header, counters and table are intact,
    `verify` detects every damaged page."""
    digest: int | None
    """Digest of all pages; None unless requested, because reading all pages makes the pause longer."""


class LedgerWorkload(LocalWorkload):
    """Arena that contains a ledger, as a workload of this process (and of its children).

    `create` returns a running ledger. The constructor takes an arena that will receive a ledger. When the state is
    loaded, the ledger attaches to the received memory; when the ledger is resumed, it starts the threads. With
    `processes` > 1, the threads are divided into one share per process; all shares but one run in child processes. If a
    child exits, the next pause raises WorkloadDied. With `exact`, the state contains a digest of all pages. `on_moved`
    is called when the ledger runs at the destination. With `postcopy`, pages may still be missing when the state is
    loaded; they are loaded on demand.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        processes: int = 1,
        exact: bool = False,
        on_moved: Callable[[], object] | None = None,
        postcopy: bool = False,
    ) -> None:
        if processes < 1:
            raise UsageError(f"invalid number of processes {processes}: expected at least 1")
        self.arena = arena
        self._exact = exact
        self._postcopy = postcopy
        self._stopped = False
        self._local = LocalShare(arena)
        self._shares: list[Share] = [self._local]
        control = arena.control
        control.on_pause, control.on_resume, control.on_moved = self._pause, self._resume, on_moved
        control.on_abandoned = self.stop
        control.save, control.load = self._save, self._load
        control.threads = lambda: {share.pid: share.tids for share in self._shares}
        control.report = self._report
        control.does_direct_io = False
        control.details = {"workload": "ledger", "processes": processes}
        try:
            for _ in range(processes - 1):
                self._shares.append(ChildShare(arena))
        except BaseException:
            self.stop()
            raise
        super().__init__(arena.lifecycle)  # after the children have mapped the arena, so that its regions list them

    @classmethod
    def create(
        cls,
        size: int,
        options: LedgerOptions | None = None,
        *,
        name: str | None = None,
        large_pages: bool = True,
        large_fraction: float | None = None,
        **workload: Unpack[LedgerArguments],
    ) -> Self:
        """Create an arena of `size` bytes, create and fill a ledger in it, and start the threads. With `name`, register
        the arena.

        `large_fraction` is the fraction of the 2 MiB units that may be huge pages; the others keep base pages. None:
        all units may be huge pages. `workload` contains arguments of the constructor.

        Raises UsageError if an option is out of range, if there are fewer threads than processes, or if the size is too
        small.
        """
        options = options or LedgerOptions()
        arena = Arena(size, large_pages=large_pages)
        try:
            ledger = _engine.Ledger.create(arena, **msgspec.structs.asdict(options), large_fraction=large_fraction)
        except ValueError as wrong:
            raise UsageError(str(wrong)) from wrong
        del ledger
        started = cls(arena, **workload)
        try:
            started._start(options)
            started._resume()
            if name is not None:
                arena.register(name)
                started.name = name
        except BaseException:
            started.stop()
            raise
        return started

    def verify(self) -> _engine.LedgerReport:
        """Verify every page of the paused or stopped workload. Raises WorkloadError if the memory does not contain a
        ledger."""
        return self._view().verify()

    def stalls(self, *, reset: bool = False) -> Stalls:
        """Return the durations of the writes of all processes. If `reset` is true, clear them."""
        every = [share.stalls(reset) for share in self._shares]
        histograms = zip(*(stalls.histogram for stalls in every), strict=True)
        return Stalls(max(stalls.longest for stalls in every), [sum(bucket) for bucket in histograms])

    def writes(self) -> int:
        """Return the number of writes so far by all processes and on all hosts, including those that filled the
        ledger."""
        return sum(self._local.ledger.writes())

    def stop(self) -> None:
        """End all threads and child processes permanently, and close the arena, which releases its name. The memory is
        not changed."""
        self._stopped = True
        self.arena.close()
        for share in reversed(self._shares):
            share.stop()

    def _start(self, options: LedgerOptions) -> None:
        count = len(self._shares)
        if options.threads < count:
            raise UsageError(
                f"cannot divide {options.threads} threads among {count} processes; use at least one thread per process"
            )
        for number, share in enumerate(self._shares):
            first, end = (options.threads * edge // count for edge in (number, number + 1))
            share.attach(first, end - first)
            share.start()

    def _pause(self) -> None:
        for share in reversed(self._shares):  # children first: they pause while this process waits for its own threads
            share.begin_pause()
        for share in self._shares:
            share.end_pause()

    def _resume(self) -> None:
        for share in self._shares if not self._stopped else ():
            try:
                share.resume()
            except WorkloadDied:  # resume the other shares; the next pause reports the exit
                continue

    def _save(self) -> bytes:
        ledger = self._view()
        state = LedgerState(
            options=msgspec.convert(ledger.options, LedgerOptions),
            writes=ledger.writes(),
            fingerprint=ledger.fingerprint(),
            digest=ledger.digest() if self._exact else None,
        )
        return msgspec.json.encode(state)

    def _load(self, data: bytes) -> None:
        try:
            state = msgspec.json.decode(data, type=LedgerState)
        except msgspec.MsgspecError as wrong:
            raise WorkloadError(f"cannot load the received state: it is not the state of a ledger: {wrong}") from wrong
        ledger = self._view()
        same = ledger.writes() == state.writes and ledger.fingerprint() == state.fingerprint
        if not same or not ledger.table_agrees():
            raise WorkloadError(
                f"cannot run the received ledger: its memory differs from the state at the pause ({ledger.writes()} "
                f"writes, {state.writes} at the pause)"
            )
        if state.digest is not None and ledger.digest() != state.digest:
            raise WorkloadError("cannot run the received ledger: pages differ from the state at the pause")
        self._exact = state.digest is not None  # for the next migration of this ledger
        self._start(state.options)

    def _view(self) -> _engine.Ledger:
        try:
            return _engine.Ledger.attach(self._mapped_again(), threads=0)
        except ValueError as wrong:
            raise WorkloadError(str(wrong)) from wrong

    def _mapped_again(self) -> _engine.Mapping:
        """Return another mapping of the memory for inspection. Reads through the arena's mapping would populate its
        page tables.

        If pages may be missing, return the arena's own mapping instead, because only this mapping is registered with a
        userfaultfd.
        """
        if self._postcopy:
            return self.arena
        return _engine.Mapping(self.arena.descriptor, self.arena.length)

    def _report(self) -> dict[str, Any]:
        stalls = self.stalls(reset=True)
        ledger = self._local.ledger
        return {
            "pages": ledger.pages,
            "filled": ledger.filled,
            "writes": self.writes(),
            "longest-stall-ns": stalls.longest,
            "stalls": stalls.histogram,
        }
