"""Restore, by pageferry and by QEMU, in turn, of a guest of 1 GiB that has accessed all of its memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.guests import USUAL, guest, guests, save, save_by_qemu
from benchmarks.harness.bench import Setting
from benchmarks.harness.serial import SerialLines
from benchmarks.migrate.guest import Line, Running
from benchmarks.migrate.pageferry_line import PAGEFERRY, PageferryLine, Process, pageferry
from benchmarks.peers.qemu import QemuLine

RATE, HOT = 5120, 5
"""Load of the guest: 5120 pages (20 MiB) written per second, within 5 % of its memory."""
WATCHED = 4.0
"""Minimum time for which a guest is observed after its resume, seconds; `HURRIED` with --quick."""
HURRIED = 1.2
TIMEOUT = 60.0
"""Maximum time until all memory is loaded, seconds."""
WINDOW, UTILISATION = 1.0, 0.8
"""Parameters of the time to responsiveness, TTR(1 s, 80 %); see `responsive`."""
STEP = 0.01
OURS: dict[str, tuple[str, ...]] = {
    "lazy": (),
    "lazy, working set": (),
    "lazy, no prefetch": ("--no-prefetch",),
    "eager": ("--eager",),
}
PEERS: dict[str, tuple[str, ...]] = {
    "mapped-ram, multifd": ("mapped-ram", "multifd"),
    "mapped-ram": ("mapped-ram",),
    "stream": (),
}
"""QEMU's methods, with the capabilities of the incoming migration. The second method reads the file of the first."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Save the guest once with each method, and restore it repeatedly."""
    place, words = guest(setting, RATE, HOT)
    runs, watched = [], period(setting)
    with guests(place, words, "to be restored") as (ours, theirs):
        image, mapped, stream = (setting.folder / name for name in ("image", "mapped", "stream"))
        usual = {ours.label: save_ours(ours, image), theirs.label: save_theirs(theirs, mapped, stream)}
        ours.end()
        theirs.end()
        for _ in range(setting.repetitions):
            for method, options in OURS.items():
                if method != "lazy, working set":
                    image.with_name("image.ws").unlink(missing_ok=True)
                run = restore(ours, image, usual[ours.label], *options, watched=watched)
                runs.append({"line": "pageferry", "method": method} | run)
            for method, capabilities in PEERS.items():
                file = mapped if "mapped-ram" in capabilities else stream
                run = restore_by_qemu(theirs, file, usual[theirs.label], capabilities, watched=watched)
                runs.append({"line": "QEMU", "method": method} | run)
    return runs


def period(setting: Setting) -> float:
    """Return the minimum time for which a guest is observed after its resume, seconds."""
    return HURRIED if setting.quick else WATCHED


def restore(
    line: PageferryLine,
    image: str | Path,
    usual: float,
    *options: str,
    watched: float = WATCHED,
    through: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Restore with `pageferry restore`, and return the figures. `through`: command prefix.

    The guest is observed for at least `watched` seconds and, with prefetch, until all of its memory is loaded.
    """
    line.hops += 1
    name = line.name(line.hops)
    line.serial.ticks.clear()
    begin = time.time()
    words = ("restore", name, str(image), "--output", "json", *options, "--", *line.command(line.hops))
    told = Told(pageferry(*words, through=through))
    try:
        running = Running.behind(line.monitor_path(line.hops))
        first = told.wait("running", TIMEOUT)
        assert first is not None
        resumed = _resumed(running)
        restored = told.wait("restore", watched if "--no-prefetch" in options else TIMEOUT)
        time.sleep(max(resumed + watched - time.time(), 0))
        if restored is None:
            restored = told.wait("restore-progress", 0) or {}
        result = _looked_at(line, resumed, first["time-to-running"] / 1e3, usual)
    finally:
        subprocess.run([PAGEFERRY, "stop", name], check=False, capture_output=True)
        told.end()
    return result | {
        "running-ms": first["time-to-running"],
        "command-to-resume-ms": (resumed - begin) * 1e3,
        **_figures(told, restored, begin),
    }


def _figures(told: Told, restored: dict[str, Any], begin: float) -> dict[str, Any]:
    """Return the figures of the result of a restore, or of its last progress event."""
    parts = restored.get("time-parts", {})
    return {
        "parts": parts,
        "qemu-start-ms": parts.get("qemu-start"),
        "complete-ms": told.at.get("restore", 0.0) * 1e3 - begin * 1e3 if parts else None,
        "faults": restored.get("faults"),
        "missed": restored.get("missed"),
        "bytes-read": restored.get("bytes-read"),
        "prefetched": restored.get("prefetched"),
    }


def restore_by_qemu(
    line: QemuLine, file: Path, usual: float, capabilities: tuple[str, ...], *, watched: float = WATCHED
) -> dict[str, Any]:
    """Restore with `migrate-incoming` in a QEMU that is already waiting, and return the figures."""
    line.hops += 1
    line.serial.ticks.clear()
    start = time.time()
    line.launch(line.hops, ("-incoming", "defer"))
    try:
        running = Running.behind(line.monitor_path(line.hops))
        line.set_up(running, {name: name in capabilities for name in ("mapped-ram", "multifd")})
        begin = time.time()
        running.monitor.execute("migrate-incoming", uri=f"file:{file}")
        resumed = running.monitor.wait("RESUME")
        time.sleep(watched)
        result = _looked_at(line, resumed, resumed - begin, usual)
    finally:
        line.end()
    return result | {
        "running-ms": (resumed - begin) * 1e3,
        "command-to-resume-ms": (resumed - start) * 1e3,
        "qemu-start-ms": (begin - start) * 1e3,
        "complete-ms": (resumed - start) * 1e3,
        "bytes-read": file.stat().st_blocks * 512,
    }


def responsive(serial: SerialLines, resumed: float, end: float, usual: float) -> float | None:
    """Return TTR(w, u): the time after which the utilisation of each window of w seconds is at least u.

    Utilisation is the write rate divided by the usual rate. None: not reached before `end`.
    """
    starts = list(itertools.takewhile(lambda at: at + WINDOW <= end, itertools.count(resumed, STEP)))
    good = [serial.rate(at, at + WINDOW) >= UTILISATION * usual for at in starts]
    late = next((number for number in range(len(good), 0, -1) if not good[number - 1]), 0)
    return starts[late] - resumed if late < len(starts) else None


class Told:
    """Events of a command, read in a thread."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.at: dict[str, float] = {}
        """Time of the last event of each type, seconds since 1970."""
        self._last: dict[str, dict[str, Any]] = {}
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self, kind: str, timeout: float) -> dict[str, Any] | None:
        """Wait for an event of this type, and return the last one; None after the timeout or the end of the command."""
        with self._news:
            self._news.wait_for(lambda: kind in self._last or not self._reader.is_alive(), timeout)
            return self._last.get(kind)

    def end(self) -> None:
        """Wait until the command exits. Kill it after 10 s."""
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        for line in self._lines():
            said = json.loads(line)
            with self._news:
                self._last[said["type"]], self.at[said["type"]] = said, time.time()
                self._news.notify_all()

    def _lines(self) -> Iterator[bytes]:
        assert self.process.stdout is not None
        yield from self.process.stdout


def save_ours(line: PageferryLine, image: Path) -> float:
    """Save the guest with pageferry. Return its usual writes per second."""
    usual = _usual(line)
    save(line, image)
    return usual


def save_theirs(line: QemuLine, mapped: Path, stream: Path) -> float:
    """Save the guest with QEMU, to a mapped-ram file and to a stream. Return its usual writes per second."""
    usual = _usual(line)
    save_by_qemu(line, mapped, ("mapped-ram", "multifd"))
    time.sleep(0.2)
    save_by_qemu(line, stream, ())
    return usual


def _usual(line: Line) -> float:
    """Run a guest without interference. Return its writes per second."""
    assert line.current is not None
    line.current.monitor.execute("cont")
    time.sleep(2 * USUAL + 0.5)
    now = time.monotonic()
    return max(line.serial.rate(now - 2 * USUAL, now - 0.1), 1.0)


def _looked_at(line: Line, resumed: float, until_running: float, usual: float) -> dict[str, Any]:
    """Check that the guest is intact. Return its activity since `resumed` (seconds since 1970)."""
    if line.serial.errors:
        raise RuntimeError(f"cannot measure {line.label}: the guest has found incorrect pages")
    clock = time.monotonic() - time.time()
    deadline = time.monotonic() + TIMEOUT
    while not (ticks := list(line.serial.ticks)) and time.monotonic() < deadline:
        time.sleep(STEP)
    if not ticks:
        raise RuntimeError(
            f"cannot measure {line.label}: no output from the guest: {'; '.join(line.serial.words[-3:])}"
        )
    ttr = responsive(line.serial, resumed + clock, ticks[-1][0], usual)
    return {
        "usual-writes-s": usual,
        "first-tick-ms": (until_running + ticks[0][0] - clock - resumed) * 1e3,
        "ttr-ms": None if ttr is None else (until_running + ttr) * 1e3,
        "first-second": line.serial.rate(resumed + clock, resumed + clock + 1) / usual,
    }


def _resumed(running: Running) -> float:
    running.monitor.execute("query-status")  # the reply follows all earlier events
    return dict(running.monitor.history)["RESUME"]
