"""Migration of the same guest by QEMU and by pageferry, alternately.

The guests run under TCG and, if possible, under KVM. Every line is measured once. Then QEMU's two best methods, the
method with qemu.qmp and pageferry are repeated.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate.guest import BUSY, IDLE, MEMORY, PAYLOAD_BUSY, PAYLOAD_IDLE, Line, Place
from benchmarks.migrate.pageferry_line import PageferryLine, reap
from benchmarks.peers.qemu import QemuLine
from tests.guest import payload

BALLAST = 1280 << 20
"""Size of the ballast, bytes: a fully allocated guest of 1 GiB, and a reserve."""
BOOT = 90.0
LOADS = {"tcg": {"busy": BUSY, "idle": IDLE}, "kvm": {"busy": PAYLOAD_BUSY, "idle": PAYLOAD_IDLE}}
"""Options of the guest by accelerator and load."""
Method = tuple[str, dict[str, Any]]
"""Name and options of a method."""
TUNED: list[Method] = [("precopy", {}), ("multifd", {"multifd": True})]
SCRIPTED: Method = ("multifd, qemu.qmp", {"multifd": True, "scripted": True})
DEFAULT: Method = ("precopy, default bandwidth", {"default": True})
INTERPRETER = (sys.executable, "-c", "import asyncio, msgspec")
"""Command that only starts Python."""
Trip = tuple[Line, Method]


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure all lines with both accelerators under both loads."""
    start = _interpreter_start()
    with Ballast(BALLAST) as ballast:
        runs = [
            {"accel": place.accel, "load": load} | run
            for place in _places(setting)
            for load in setting.chosen(list(LOADS[place.accel]))
            for run in _under(load, place, ballast, setting)
        ]
    return [run | {"own-cpu-s": run["cpu-s"] - run.get("agents", 0) * start} for run in runs]


def _places(setting: Setting) -> list[Place]:
    """Return the place of the checker under TCG and, if KVM can be used, the place of the payload under KVM."""
    found = [replace(Place.of_checker(setting), memory=MEMORY)]
    if (reason := payload.obstacle("kvm")) is None:
        found.append(replace(Place.of_payload(setting, "kvm"), memory=MEMORY))
    else:
        print(f"guests on KVM are left out: {reason}", file=sys.stderr)
    return found


def _under(load: str, place: Place, ballast: Ballast, setting: Setting) -> list[dict[str, Any]]:
    def moved(trip: Trip, repetition: int) -> dict[str, Any]:
        line, (name, options) = trip
        run = line.move(ballast, **options)
        line.rest()
        return {"method": name, "repetition": repetition, "chosen": False} | run

    with booted(_lines(place, load, setting)) as lines:
        ballast.hold()
        trips = [(line, method) for line, methods in lines for method in methods]
        first = [moved(trip, 0) for trip in trips]
        best = chosen(first)
        runs = [run | {"chosen": number in best} for number, run in enumerate(first)]
        for repetition in range(1, setting.repetitions + 1) if not setting.quick else ():
            runs += [moved(trips[number], repetition) | {"chosen": True} for number in best]
        return runs + _as_shipped(lines, ballast)


def chosen(runs: Sequence[dict[str, Any]]) -> list[int]:
    """Return the indices of the runs to repeat: QEMU's runs with the shortest total and with the shortest pause (if one
    run has both, the run with the second shortest total, too), the fastest run of the script with qemu.qmp, and
    pageferry's fastest run."""
    alive = [number for number, run in enumerate(runs) if run["alive"]]

    def by(key: str, *methods: str) -> list[int]:
        return sorted((number for number in alive if runs[number]["method"] in methods), key=lambda at: runs[at][key])

    peers = tuple(name for name, _ in TUNED)
    fastest, shortest = by("total-ms", *peers), by("stop-to-resume-ms", *peers)
    theirs = [*fastest[:1], *shortest[:1]] if fastest[:1] != shortest[:1] else fastest[:2]
    return sorted({*theirs, *by("elapsed-ms", SCRIPTED[0])[:1], *by("total-ms", "pageferry")[:1]})


def _lines(place: Place, load: str, setting: Setting) -> list[tuple[Line, list[Method]]]:
    lines: list[tuple[Line, list[Method]]] = []
    words = LOADS[place.accel][load]
    for version, qemu in setting.chosen(list(machine.qemus().items())):
        what = f"{version} {place.accel} {load}"
        lines.append((QemuLine(f"QEMU {what}", place, qemu, words), [*TUNED, SCRIPTED]))
        if load == "busy":
            lines.append((QemuLine(f"QEMU {what} shared file", place, qemu, words, shared_file=True), TUNED))
        lines.append((PageferryLine(f"pageferry {what}", place, qemu, words), [("pageferry", {})]))
    return lines


def _as_shipped(lines: Sequence[tuple[Line, list[Method]]], ballast: Ballast) -> list[dict[str, Any]]:
    """Migrate once with each QEMU, with the default bandwidth limit and all other settings unchanged."""
    name, options = DEFAULT
    found = [line for line, _ in lines if isinstance(line, QemuLine) and not line.shared_file]
    return [{"method": name, "repetition": 0, "chosen": False} | line.move(ballast, **options) for line in found]


def _interpreter_start() -> float:
    """Return the least CPU time of a start of Python, seconds."""
    return min(reap(subprocess.Popen(INTERPRETER)) for _ in range(5))


@contextlib.contextmanager
def booted(lines: list[tuple[Line, list[Method]]]) -> Iterator[list[tuple[Line, list[Method]]]]:
    """Boot all guests and pause them; terminate them after the block."""
    try:
        for line, _ in lines:
            line.boot()
        for line, _ in lines:
            if not line.serial.ready.wait(BOOT):
                raise RuntimeError(f"cannot boot the guest of {line.label} within {BOOT:g} s")
        for line, _ in lines:
            line.rest()
        yield lines
    finally:
        for line, _ in lines:
            line.end()
