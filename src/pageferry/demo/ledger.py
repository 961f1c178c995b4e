"""The built-in workload: an arena that threads of one or more processes write to, in which every lost write shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import msgspec

from pageferry import _engine
from pageferry.demo.shares import ChildShare, LocalShare, Share, Stalls
from pageferry.errors import UsageError, WorkloadDied, WorkloadError
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.lifecycle import LocalWorkload


class LedgerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a ledger is made and written; `_engine.Ledger.create` explains each of them. Fractions are of 1."""

    threads: int = 1
    """Of all processes together; each owns a part of the pages."""
    seed: int = 1
    rate: int | None = None
    """Bytes per second of all threads together; None: as fast as they can."""
    working_set: float = 1.0
    scatter: bool = False
    skew: float = 1.0
    zero_fraction: float = 0.0
    fill: float = 1.0
    compressible: float = 0.0


class LedgerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The instant at which a ledger was paused, so that the destination can tell whether it got exactly that."""

    options: LedgerOptions
    writes: list[int]
    """Per partition."""
    fingerprint: int
    """Of header, counters and table: with these as they were, `verify` finds any page that is not."""
    digest: int | None
    """Of every page, if it was wanted: reading them all takes its time while the ledger is paused."""


class LedgerWorkload(LocalWorkload):
    """An arena with a ledger in it, as a workload of this process (and of its children).

    `create` makes one that runs. The constructor takes an arena that will receive one: `load_state` takes up what has
    come to be in memory, and `resume` lets it run. With `processes` > 1 all but one share of the threads run in child
    processes; a child that dies makes the next pause raise WorkloadDied. With `exact` a digest of every page goes with
    the state. `on_moved` is called when the ledger runs elsewhere. `late`: pages may be missing when the state comes,
    and come on access.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        processes: int = 1,
        exact: bool = False,
        on_moved: Callable[[], object] | None = None,
        late: bool = False,
    ) -> None:
        if processes < 1:
            raise UsageError(f"a ledger in {processes} processes")
        self.arena = arena
        self._exact = exact
        self._late = late
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
        super().__init__(arena.lifecycle)  # the children have mapped the arena: they are in its regions

    @classmethod
    def create(
        cls,
        size: int,
        options: LedgerOptions | None = None,
        *,
        name: str | None = None,
        processes: int = 1,
        exact: bool = False,
        large_pages: bool = True,
        large_fraction: float | None = None,
        on_moved: Callable[[], object] | None = None,
    ) -> Self:
        """Make an arena of `size` bytes, fill a ledger in it and start its threads; with a name, register it.

        `large_fraction` keeps the other part of the 2 MiB units on small pages. Raises UsageError for options out of
        range, fewer threads than processes, or a size too small.
        """
        options = options or LedgerOptions()
        arena = Arena(size, large_pages=large_pages)
        try:
            ledger = _engine.Ledger.create(arena, **msgspec.structs.asdict(options), large_fraction=large_fraction)
        except ValueError as wrong:
            raise UsageError(str(wrong)) from wrong
        del ledger
        workload = cls(arena, processes=processes, exact=exact, on_moved=on_moved)
        try:
            workload._start(options)
            workload._resume()
            if name is not None:
                arena.register(name)
                workload.name = name
        except BaseException:
            workload.stop()
            raise
        return workload

    def verify(self) -> _engine.LedgerReport:
        """Check every page. The workload is paused or stopped. Raises WorkloadError when memory holds no ledger."""
        return self._view().verify()

    def stalls(self, *, reset: bool = False) -> Stalls:
        """How long single writes took, in all processes: (longest, ns; how many took 2**n up to 2**(n+1) ns)."""
        every = [share.stalls(reset) for share in self._shares]
        histograms = zip(*(histogram for _, histogram in every), strict=True)
        return max(longest for longest, _ in every), [sum(bucket) for bucket in histograms]

    def writes(self) -> int:
        """Pages written so far, filling included, by all processes and on all hosts that this ledger has been on."""
        return sum(self._local.ledger.writes())

    def stop(self) -> None:
        """End all threads and children for good, give up the name, leave the memory as it is."""
        self._stopped = True
        self.arena.close()
        for share in reversed(self._shares):
            share.stop()

    def _start(self, options: LedgerOptions) -> None:
        count = len(self._shares)
        if options.threads < count:
            raise UsageError(f"{options.threads} threads cannot be shared out to {count} processes")
        for number, share in enumerate(self._shares):
            first, end = (options.threads * edge // count for edge in (number, number + 1))
            share.attach(first, end - first)
            share.start()

    def _pause(self) -> None:
        for share in reversed(self._shares):  # children first: they park while we wait for our own threads
            share.begin_pause()
        for share in self._shares:
            share.end_pause()

    def _resume(self) -> None:
        for share in self._shares if not self._stopped else ():
            try:
                share.resume()
            except WorkloadDied:  # the others go on; the next pause says so
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
            raise WorkloadError(f"the state that came is not a ledger's: {wrong}") from wrong
        ledger = self._view()
        same = ledger.writes() == state.writes and ledger.fingerprint() == state.fingerprint
        if not same or not ledger.table_agrees():
            raise WorkloadError(
                f"memory is not of the instant of the pause: {ledger.writes()} writes, {state.writes} sent"
            )
        if state.digest is not None and ledger.digest() != state.digest:
            raise WorkloadError("pages differ from those of the instant of the pause")
        self._exact = state.digest is not None  # on its next journey, too
        self._start(state.options)

    def _view(self) -> _engine.Ledger:
        try:
            return _engine.Ledger.attach(self._mapped_again(), threads=0)
        except ValueError as wrong:
            raise WorkloadError(str(wrong)) from wrong

    def _mapped_again(self) -> _engine.Mapping:
        """A mapping for looking at the memory: through the arena's own it would populate the workload's page tables.

        Where pages may be missing only the arena's own traps.
        """
        if self._late:
            return self.arena
        return _engine.Mapping(self.arena.descriptor, self.arena.length)

    def _report(self) -> dict[str, Any]:
        longest, histogram = self.stalls(reset=True)
        ledger = self._local.ledger
        return {
            "pages": ledger.pages,
            "filled": ledger.filled,
            "writes": self.writes(),
            "longest-stall-ns": longest,
            "stalls": histogram,
        }
