"""Migration of the same guest by QEMU and by pageferry, alternately."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate.guest import BUSY, IDLE, Line, Place
from benchmarks.migrate.pageferry_line import PageferryLine
from benchmarks.peers.qemu import QemuLine
from tests.guest import initrd

BALLAST = 1280 << 20
"""Size of the ballast, bytes: a fully allocated guest of 1 GiB, and a reserve."""
BOOT = 90.0
LOADS = {"busy": BUSY, "idle": IDLE}
Method = tuple[str, dict[str, Any]]
"""Name and options of a method."""
TUNED: list[Method] = [("precopy", {}), ("multifd", {"multifd": True})]
DEFAULT: Method = ("precopy, default bandwidth", {"default": True})


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure all lines under both loads."""
    place = Place(setting.folder, machine.KERNEL, initrd.build(machine.CHECKER))
    with Ballast(BALLAST) as ballast:
        return [run for load in LOADS for run in _under(load, place, ballast, setting.repetitions)]


def _under(load: str, place: Place, ballast: Ballast, repetitions: int) -> list[dict[str, Any]]:
    runs = []
    with booted(_lines(place, load)) as lines:
        ballast.hold()
        for repetition in range(repetitions):
            for line, methods in lines:
                for name, options in methods:
                    run = line.move(ballast, **options)
                    line.rest()
                    runs.append({"load": load, "method": name, "repetition": repetition} | run)
        return runs + _as_shipped(lines, load, ballast)


def _lines(place: Place, load: str) -> list[tuple[Line, list[Method]]]:
    lines: list[tuple[Line, list[Method]]] = []
    words = LOADS[load]
    for version, qemu in _qemus().items():
        lines.append((QemuLine(f"QEMU {version} {load}", place, qemu, words), TUNED))
        if load == "busy":
            shared = QemuLine(f"QEMU {version} {load} shared file", place, qemu, words, shared_file=True)
            lines.append((shared, TUNED))
        lines.append((PageferryLine(f"pageferry {version} {load}", place, qemu, words), [("pageferry", {})]))
    return lines


def _qemus() -> dict[str, Path]:
    """Return the available QEMU binaries by version: the machine's own and the newest."""
    found = [path for path in (machine.OWN_QEMU, machine.QEMU) if path.exists()]
    return {".".join(machine.qemu_version(path).split(".")[:2]): path for path in found}


def _as_shipped(lines: Sequence[tuple[Line, list[Method]]], load: str, ballast: Ballast) -> list[dict[str, Any]]:
    """Migrate once with each QEMU, with the default bandwidth limit and all other settings unchanged."""
    name, options = DEFAULT
    chosen = [line for line, _ in lines if isinstance(line, QemuLine) and not line.shared_file]
    return [{"load": load, "method": name, "repetition": 0} | line.move(ballast, **options) for line in chosen]


@contextlib.contextmanager
def booted(lines: list[tuple[Line, list[Method]]]) -> Iterator[list[tuple[Line, list[Method]]]]:
    """Boot all guests and pause them; terminate them after the block."""
    try:
        for line, _ in lines:
            line.boot()
        for line, _ in lines:
            if not line.serial.ready.wait(BOOT):
                raise RuntimeError(f"{line.label}: the guest has not booted within {BOOT:g} s")
        for line, _ in lines:
            line.rest()
        yield lines
    finally:
        for line, _ in lines:
            line.end()
