"""Post-copy and hybrid migration, by QEMU and by pageferry, of a guest that writes faster than the link transfers."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate.guest import Line, Place, Running
from benchmarks.migrate.pageferry_line import PageferryLine
from benchmarks.migrate.side_by_side import booted
from benchmarks.peers.qemu import QemuLine

FULL, SMALL = 160, 24
"""Memory that the guest writes to, MiB; the second value is for --quick."""
RATE = 12800
"""Rate of random writes, pages per second: 50 MiB/s."""
LINK = 32 << 20
"""Bandwidth limit of QEMU and pageferry, bytes per second."""
TIMEOUT = 4.0
"""Time limit for QEMU's pre-copy, in multiples of the time to send the memory once. QEMU itself has no limit."""
SLICE = 0.25
"""Interval of the samples of the write rate, seconds."""
MODES = ("postcopy", "hybrid")


class LateQemuLine(QemuLine):
    """Guest that is migrated by QEMU's own post-copy, which mode `hybrid` starts after the first round.

    Options of a migration: `mode`.
    """

    def set_up(self, running: Running, capabilities: dict[str, bool]) -> None:
        super().set_up(running, {"postcopy-ram": True, "postcopy-blocktime": True})
        running.monitor.execute("migrate-set-parameters", max_bandwidth=LINK, max_postcopy_bandwidth=LINK)

    def begin(self, source: Running, options: dict[str, Any]) -> None:
        super().begin(source, options)
        rounds = {"postcopy": 1, "hybrid": 2}.get(options["mode"])
        if rounds is not None:
            while source.monitor.execute("query-migrate").get("ram", {}).get("dirty-sync-count", 0) < rounds:
                time.sleep(0.01)
            source.monitor.execute("migrate-start-postcopy")

    def finish(self, source: Running, destination: Running) -> dict[str, Any]:
        told = super().finish(source, destination)
        return told | {"blocked-ms": destination.monitor.execute("query-migrate").get("postcopy-blocktime")}

    def never_ends(self, seconds: float) -> dict[str, Any]:
        """Migrate by pre-copy over the same link, and give up after `seconds`.

        Return whether the migration completed, its duration in milliseconds, and its number of rounds.
        """
        source = self.current
        assert source is not None
        source.monitor.execute("cont")
        self.launch(self.hops + 1, ("-incoming", "defer"))
        self.accept(Running.behind(self.monitor_path(self.hops + 1)))
        begin = time.monotonic()
        self.begin(source, {"mode": "precopy"})
        told: dict[str, Any] = {"status": "active"}
        while time.monotonic() < begin + seconds and told["status"] != "completed":
            time.sleep(0.1)
            told = source.monitor.execute("query-migrate")
        return {
            "line": "QEMU",
            "mode": f"precopy, given up after {TIMEOUT:g} x",
            "ended": told["status"] == "completed",
            "total-ms": (time.monotonic() - begin) * 1e3,
            "transferred": told["ram"]["transferred"],
            "rounds": told["ram"]["dirty-sync-count"],
        }


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure both lines in both modes, then QEMU's pre-copy."""
    place = Place.of_checker(setting)
    mebibytes = SMALL if setting.quick else FULL
    words = f"ferry.mib={mebibytes} ferry.rate={RATE} ferry.verify=0 ferry.tick=10 ferry.zero=0"
    ours = PageferryLine("late ours", place, machine.QEMU, words)
    theirs = LateQemuLine("late theirs", place, machine.QEMU, words)
    runs = []
    with booted([(ours, []), (theirs, [])]), Ballast(place.reserve) as ballast:
        for _ in range(setting.repetitions):
            for mode in MODES:
                ballast.hold()
                options = ("--mode", mode, "--bandwidth", str(LINK))
                runs.append(_moved(ours, ballast, words=options) | {"line": "pageferry", "mode": mode})
                ballast.hold()
                runs.append(_moved(theirs, ballast, mode=mode) | {"line": "QEMU", "mode": mode})
        runs.append(theirs.never_ends((1 if setting.quick else TIMEOUT) * once(runs)))
    return runs


def once(runs: list[dict[str, Any]]) -> float:
    """Return the time to send all of the memory once, seconds, computed from the bytes that post-copy sent."""
    sent = [run["transferred"] for run in runs if (run["mode"], run["line"]) == ("postcopy", "pageferry")]
    return float(max(sent) / LINK)


def _moved(line: Line, ballast: Ballast, **options: Any) -> dict[str, Any]:
    """Migrate once. Return the figures, with the guest's write rate in each slice."""
    run = line.move(ballast, **options)
    line.rest()
    begin, end = line.under_way
    rates = [line.serial.rate(at, at + SLICE) for at in _slices(begin, end)]
    waits = (run.get("postcopy") or {}).get("waits") or {}
    return run | {
        "writes-per-second": rates,
        "work-percent": sum(rates) / len(rates) / RATE * 100,
        "p50-us": waits.get("p50-us"),
        "p99-us": waits.get("p99-us"),
    }


def _slices(begin: float, end: float) -> list[float]:
    return [begin + SLICE * number for number in range(max(int((end - begin) / SLICE), 1))]
