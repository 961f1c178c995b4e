"""Checkpoints, by pageferry and by QEMU's own methods in turn, of a guest of 1 GiB that writes to all of its memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.bench import Setting
from benchmarks.migrate.guest import Line, Place
from benchmarks.migrate.pageferry_line import PageferryLine, expect, pageferry, reap
from benchmarks.migrate.side_by_side import booted
from benchmarks.peers.monitor import Monitor
from benchmarks.peers.qemu import QemuLine

FULL, SMALL = 860, 32
"""Memory that the guest writes to, MiB: the maximum for a guest of 1 GiB, and a small size for --quick."""
RATES = {"20 MiB/s": 5120, "as fast as it can": 1_000_000}
"""Rates of random writes, pages per second."""
USUAL = 1.0
"""Seconds before the checkpoint in which the usual rate is measured."""
AFTER = 0.2
"""Seconds to wait after a checkpoint for the guest's last ticks."""
PEERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "background-snapshot": (("background-snapshot",), False),
    "mapped-ram, multifd": (("mapped-ram", "multifd"), False),
    "stop-and-copy, mapped-ram, multifd": (("mapped-ram", "multifd"), True),
}
"""QEMU's methods: their capabilities, and whether the guest is stopped before the migration."""
CAPABILITIES = ("mapped-ram", "multifd", "background-snapshot")
OURS: dict[str, tuple[str, ...]] = {"lazy": (), "stop": ("--mode", "stop")}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure each method under both loads."""
    runs = []
    image = setting.folder / "image"
    usual = setting.period(USUAL)
    for load, rate in list(RATES.items())[: 1 if setting.quick else None]:
        place, words = guest(setting, rate)
        with guests(place, words, load) as (ours, theirs):
            for _ in range(setting.repetitions):
                for method, options in OURS.items():
                    run = watched(ours, lambda: save(ours, image, *options), usual)  # noqa: B023
                    runs.append({"load": load, "line": "pageferry", "method": method} | run)
                for method, (capabilities, stopped) in PEERS.items():
                    run = watched(theirs, lambda: save_by_qemu(theirs, image, capabilities, stopped), usual)  # noqa: B023
                    image.unlink()
                    runs.append({"load": load, "line": "QEMU", "method": method} | run)
    return runs


def guest(setting: Setting, rate: int, hot: int = 100) -> tuple[Place, str]:
    """Return the place of the guests, and the options of their program.

    The program is the checker, which writes `rate` pages per second to `hot` percent of its memory. With --quick, it is
    the payload, which needs no operating system.
    """
    if setting.quick:
        return Place.of_payload(setting), f"ferry.mib={SMALL} ferry.writes=16"
    words = f"ferry.mib={FULL} ferry.rate={rate} ferry.hot={hot} ferry.verify=0 ferry.tick=10 ferry.zero=10"
    return Place.of_checker(setting), words


@contextlib.contextmanager
def guests(place: Place, words: str, load: str) -> Iterator[tuple[PageferryLine, QemuLine]]:
    """Yield the same guest twice, paused: managed by pageferry, and in QEMU without pageferry."""
    stem = load.replace("/", " per ")
    ours = PageferryLine(f"ours {stem}", place, machine.QEMU, words)
    theirs = QemuLine(f"theirs {stem}", place, machine.QEMU, words)
    with booted([(ours, []), (theirs, [])]):
        yield ours, theirs


def save(line: PageferryLine, image: Path, *words: str) -> dict[str, Any]:
    """Save a guest with `pageferry checkpoint`. Return the figures, with `begin` and `end` on the monotonic clock."""
    process = pageferry("checkpoint", line.name(line.hops), str(image), "--output", "json", *words)
    told = expect(process, "checkpoint")
    end = time.monotonic()
    return told_by(told) | {"begin": end - told["total-time"] / 1e3, "end": end, "cpu-s": reap(process)}


def told_by(told: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a checkpoint under the names of the tables. Rates are in MiB of data pages per second."""
    seconds = max(told["total-time"] - told["arm-time"], 1) / 1e3
    return {
        "total-ms": told["total-time"],
        "own-pause-ms": told["downtime"],
        "device-state-ms": told["downtime-parts"]["device-state"],
        "beside-state-ms": told["downtime"] - told["downtime-parts"]["device-state"],
        "parts": told["downtime-parts"],
        "arm-ms": told["arm-time"],
        "saved-mib-s": told["pages"]["data"] / 256 / seconds,
        "bytes": told["bytes-written"],
        "writes": told["writes"],
        "mean-write": told["mean-write"],
        "data-pages": told["pages"]["data"],
        "traps": told["traps"],
        "trap-us": told["trap-details"]["mean-us"],
        "compression": told["compression"],
    }


def save_by_qemu(line: QemuLine, image: Path, capabilities: Sequence[str], stopped: bool = False) -> dict[str, Any]:
    """Save the running guest to a file with QEMU's own migration. Return the figures, as `save` does."""
    assert line.current is not None
    monitor = line.current.monitor
    line.set_up(line.current, {name: name in capabilities for name in CAPABILITIES})
    counted = _io(line.current.pid)
    begin = time.monotonic()
    if stopped:
        monitor.execute("stop")
    monitor.execute("migrate", uri=f"file:{image}")
    monitor.wait("MIGRATION", status="completed")
    end = time.monotonic()
    if not monitor.execute("query-status")["running"]:
        _go_on(monitor)
        end = time.monotonic()
    calls, written = (after - before for after, before in zip(_io(line.current.pid), counted, strict=True))
    told = monitor.execute("query-migrate")
    return {
        "begin": begin,
        "end": end,
        "total-ms": (end - begin) * 1e3,
        "own-pause-ms": told["downtime"],
        "bytes": image.stat().st_blocks * 512,
        "writes": calls,
        "mean-write": written / max(calls, 1),
        "rounds": told["ram"]["dirty-sync-count"],
    }


def _go_on(monitor: Monitor) -> None:
    """Resume a guest whose migration has just completed. Retry while QEMU refuses, until its cleanup is complete."""
    deadline = time.monotonic() + 10
    while True:
        try:
            monitor.execute("cont")
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def watched(line: Line, save: Callable[[], dict[str, Any]], period: float = USUAL) -> dict[str, Any]:
    """Resume a guest, save it while it runs, and pause it again.

    The usual write rate is measured for `period` seconds before the checkpoint. Return the figures of `save`, the pause
    according to QEMU's events, and the drop of the write rate. Raises RuntimeError if the guest has found incorrect
    pages.
    """
    assert line.current is not None
    monitor = line.current.monitor
    monitor.execute("cont")
    monitor.wait("RESUME")
    time.sleep(period + AFTER)
    seen = len(monitor.history)
    run = save()
    time.sleep(AFTER)
    monitor.execute("query-status")  # the reply follows all earlier events
    happened = dict(monitor.history[seen:])
    begin, end = run.pop("begin"), run.pop("end")
    usual = max(line.serial.rate(begin - period, begin), 1.0)
    if line.serial.errors:
        raise RuntimeError(f"cannot measure {line.label}: the guest has found incorrect pages")
    line.rest()
    return run | {
        "pause-ms": (happened["RESUME"] - happened["STOP"]) * 1e3,
        "usual-writes-s": usual,
        "slowdown-percent": (1 - line.serial.rate(begin, end) / usual) * 100,
    }


def _io(pid: int) -> tuple[int, int]:
    """Return the number of write calls of a process, and the bytes written (proc(5), /proc/PID/io)."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines["syscw"]), int(lines["wchar"])
