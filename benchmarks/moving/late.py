"""Moves in which the guest runs before its pages are there: post-copy and hybrid, by QEMU and by pageferry."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.measuring import machine
from benchmarks.measuring.ballast import Ballast
from benchmarks.measuring.bench import Setting
from benchmarks.moving.guest import Line, Place, Running
from benchmarks.moving.pageferry_line import PageferryLine
from benchmarks.moving.side_by_side import booted
from benchmarks.peers.qemu import QemuLine
from tests.guest import initrd

FULL, SMALL = 160, 48
"""MiB that the guest writes to."""
RATE = 12800
"""Pages per second, all over: 50 MiB/s, more than the link carries."""
LINK = 32 << 20
"""Bytes per second, that both are limited to."""
PATIENCE = 4.0
"""Times that sending the memory once takes, after which a pre-copy is given up."""
USUAL = 1.0
MODES = ("postcopy", "hybrid")


class LateQemuLine(QemuLine):
    """QEMU's own: `hybrid` begins post-copy when all memory has been sent once. Options of a move: `mode`."""

    def prepare(self, number: int, options: dict[str, Any]) -> None:
        self.launch(number, ("-incoming", "defer"))

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
        blocked = destination.monitor.execute("query-migrate").get("postcopy-blocktime")
        return told | {"blocked-ms": blocked}

    def never_ends(self, seconds: float) -> dict[str, Any]:
        """A pre-copy over the same link, which is given up after a time; whether it had to be."""
        source = self.current
        assert source is not None
        source.monitor.execute("cont")
        self.launch(self.hops + 1, ("-incoming", "defer"))
        destination = Running.behind(self.monitor_path(self.hops + 1))
        self.accept(destination)
        begin = time.monotonic()
        self.begin(source, {"mode": "precopy"})
        status = "active"
        while time.monotonic() < begin + seconds and status != "completed":
            time.sleep(0.1)
            told = source.monitor.execute("query-migrate")
            status = told["status"]
        return {
            "line": "QEMU",
            "method": "precopy, given up",
            "ended": status == "completed",
            "total-ms": (time.monotonic() - begin) * 1e3,
            "transferred": told["ram"]["transferred"],
            "rounds": told["ram"]["dirty-sync-count"],
        }


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Both lines in both modes, and QEMU's pre-copy at the end."""
    place = Place(setting.folder, machine.KERNEL, initrd.build(machine.CHECKER))
    mebibytes = SMALL if setting.quick else FULL
    words = f"ferry.mib={mebibytes} ferry.rate={RATE} ferry.verify=0 ferry.tick=10 ferry.zero=0"
    ours = PageferryLine("late ours", place, machine.QEMU, words)
    theirs = LateQemuLine("late theirs", place, machine.QEMU, words)
    runs = []
    with booted([(ours, []), (theirs, [])]), Ballast(1280 << 20) as ballast:
        for _ in range(setting.repetitions):
            for mode in MODES:
                ballast.hold()
                options = ("--mode", mode, "--bandwidth", str(LINK))
                runs.append({"line": "pageferry", "method": mode} | _moved(ours, ballast, words=options))
                ballast.hold()
                runs.append({"line": "QEMU", "method": mode} | _moved(theirs, ballast, mode=mode))
        runs.append(theirs.never_ends(PATIENCE * once(runs)))
    return runs


def once(runs: list[dict[str, Any]]) -> float:
    """Seconds that sending all of the memory once takes: of a post-copy, which does nothing else."""
    sent = [run["transferred"] for run in runs if run["method"] == "postcopy" and run["line"] == "pageferry"]
    return float(max(sent) / LINK)


def _moved(line: Line, ballast: Ballast, **options: Any) -> dict[str, Any]:
    """One move, with what the guest got done in each quarter of a second of it."""
    assert line.current is not None
    run = line.move(ballast, **options)
    end = time.monotonic()
    line.rest()
    rates = [line.serial.rate(at, at + 0.25) for at in _quarters(end - run["total-ms"] / 1e3, end)]
    waits = (run.get("postcopy") or {}).get("waits") or {}
    return run | {
        "writes-per-second": rates,
        "work-percent": sum(rates) / len(rates) / RATE * 100,
        "p50-us": waits.get("p50-us"),
        "p99-us": waits.get("p99-us"),
    }


def _quarters(begin: float, end: float) -> list[float]:
    return [begin + 0.25 * number for number in range(max(int((end - begin) / 0.25), 1))]
