"""Migration, in each mode, of the built-in workload, which writes faster than the link transfers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from types import TracebackType
from typing import Any, Self

from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate import trips
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import expect, reap
from pageferry import _engine
from pageferry._engine import Mapping
from pageferry.errors import PageferryError
from pageferry.workloads.open import open_workload
from pageferry.workloads.protocols import Migratable

FULL, SMALL = 256 << 20, 32 << 20
LINK = 64 << 20
"""Bandwidth limit (`--bandwidth`), bytes per second."""
WRITER = {"rate": 2 * LINK}
"""Options of a ledger that writes to all pages of the arena; `rate` is in bytes per second."""
MODES = ("postcopy", "hybrid")
SLICE = 0.1
"""Interval of the samples of the write rate, seconds."""
USUAL = 1.0
"""Seconds before the migration in which the usual rate is measured."""
AFTER = 0.5


class Throughput:
    """Samples of the number of writes of a ledger, at the source and at the destination."""

    def __init__(self, ledger: Ledger) -> None:
        self._name = ledger.name
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), daemon=True)
        self.readings: list[tuple[float, int]] = []
        """Samples: time in seconds on the monotonic clock, and number of pages written until then."""

    def goes_on_at(self, name: str) -> None:
        """Sample the workload of this name from now on."""
        self._name = name

    def between(self, begin: float, end: float) -> float:
        """Return the pages written per second between two times."""
        inside = [reading for reading in self.readings if begin <= reading[0] <= end]
        if len(inside) < 2:
            return 0.0
        (early, first), (late, last) = inside[0], inside[-1]
        return (last - first) / (late - early)

    def over_time(self, begin: float, end: float) -> list[float]:
        """Return the pages written per second in each slice."""
        count = max(round((end - begin) / SLICE), 1)
        edges = [begin + number * SLICE for number in range(count + 1)]
        totals = [max((done for at, done in self.readings if at <= edge), default=0) for edge in edges]
        return [(late - early) / SLICE for early, late in itertools.pairwise(totals)]

    async def _watch(self) -> None:
        while not self._end.is_set():
            name = self._name
            try:
                workload = await open_workload(name)
            except PageferryError:  # no process runs the workload during the switch-over
                await asyncio.sleep(SLICE / 4)
                continue
            try:
                await self._read(workload, name)
            finally:
                workload.close()

    async def _read(self, workload: Migratable, name: str) -> None:
        """Sample the number of writes in the memory file, because the process may be waiting for pages."""
        (region,) = workload.regions
        mapping = Mapping(region.fd, region.length)
        while not self._end.is_set() and name == self._name:
            with contextlib.suppress(ValueError):  # the page with the counters is still missing
                done = sum(_engine.Ledger.attach(mapping, threads=0).writes())
                self.readings.append((time.monotonic(), done))
            await asyncio.sleep(SLICE / 4)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure post-copy and hybrid migrations in turn, then one pre-copy migration."""
    size = SMALL if setting.quick else FULL
    runs = []
    with Ledger("late", size, WRITER) as ledger, Ballast(size + (128 << 20)) as ballast:
        for _ in range(setting.repetitions):
            runs += [{"mode": mode} | _moved(ledger, ballast, mode) for mode in MODES]
        runs.append({"mode": "precopy"} | _given_up(ledger, ballast))
    return runs


def _moved(ledger: Ledger, ballast: Ballast, mode: str) -> dict[str, Any]:
    """Migrate once. Return the figures, with the write rate in each slice."""
    ledger.prepare()
    ballast.hold()
    with Throughput(ledger) as throughput:
        time.sleep(USUAL)
        begin = time.monotonic()
        ballast.release()
        sender = trips.begin(ledger, ("--mode", mode, "--bandwidth", str(LINK)))
        ledger.arrives()
        throughput.goes_on_at(ledger.next_name)
        told = expect(sender, "migration")
        end = time.monotonic()
        time.sleep(AFTER)
    reap(sender)
    ledger.moved()
    usual = throughput.between(begin - USUAL, begin)
    return trips.summary(told) | {
        "usual-writes-s": usual,
        "writes-per-second": throughput.over_time(end - told["total-time"] / 1e3, end),
        "work-percent": throughput.between(end - told["total-time"] / 1e3, end) / usual * 100,
    }


def _given_up(ledger: Ledger, ballast: Ballast) -> dict[str, Any]:
    """Migrate the same workload by pre-copy, which is not expected to converge.

    Return whether the migration completed, its duration in milliseconds, and its number of rounds.
    """
    ledger.prepare()
    ballast.hold()
    ballast.release()
    begin = time.monotonic()
    said = trips.failure(trips.begin(ledger, ("--mode", "precopy", "--bandwidth", str(LINK))))
    if not said["exit-code"]:
        ledger.moved()
    else:
        ledger.stays()
    return {"ended": said["exit-code"] == 0, "total-ms": (time.monotonic() - begin) * 1e3, "rounds": said["rounds"]}


def once(runs: list[dict[str, Any]]) -> float:
    """Return the time to send all of the memory once, seconds, computed from the bytes that post-copy sent."""
    return float(max(run["transferred"] for run in runs if run["mode"] == "postcopy") / LINK)
