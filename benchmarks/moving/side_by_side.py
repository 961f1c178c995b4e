"""The same guest, moved by QEMU and by pageferry, repetition by repetition."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.ballast import Ballast
from benchmarks.moving.guest import BUSY, IDLE, Line, Place
from benchmarks.moving.pageferry_line import PageferryLine
from benchmarks.peers.qemu import QemuLine

BOOT = 90.0
LOADS = {"busy": BUSY, "idle": IDLE}
Method = tuple[str, dict[str, Any]]
"""Name of a way of moving, and its options."""
TUNED: list[Method] = [("precopy", {}), ("multifd", {"multifd": True})]
DEFAULT: Method = ("precopy, default bandwidth", {"default": True})


def measure(place: Place, qemus: dict[str, Path], ballast: Ballast, repetitions: int) -> list[dict[str, Any]]:
    """All lines under both loads."""
    runs = []
    for load in LOADS:
        with booted(_lines(place, qemus, load)) as lines:
            ballast.hold()
            for repetition in range(repetitions):
                for line, methods in lines:
                    for name, options in methods:
                        run = line.move(ballast, **options)
                        line.rest()
                        runs.append({"load": load, "method": name, "repetition": repetition} | run)
            runs += _as_shipped(lines, load, ballast)
    return runs


def _lines(place: Place, qemus: dict[str, Path], load: str) -> list[tuple[Line, list[Method]]]:
    lines: list[tuple[Line, list[Method]]] = []
    words = LOADS[load]
    for version, qemu in qemus.items():
        lines.append((QemuLine(f"QEMU {version} {load}", place, qemu, words), TUNED))
        if load == "busy":
            shared = QemuLine(f"QEMU {version} {load} shared file", place, qemu, words, shared_file=True)
            lines.append((shared, TUNED))
        lines.append((PageferryLine(f"pageferry {version} {load}", place, qemu, words), [("pageferry", {})]))
    return lines


def _as_shipped(lines: Sequence[tuple[Line, list[Method]]], load: str, ballast: Ballast) -> list[dict[str, Any]]:
    """Once per QEMU, with the bandwidth limit that it comes with: what a user sees who sets nothing."""
    name, options = DEFAULT
    chosen = [line for line, _ in lines if isinstance(line, QemuLine) and not line.shared_file]
    return [{"load": load, "method": name, "repetition": 0} | line.move(ballast, **options) for line in chosen]


@contextlib.contextmanager
def booted(lines: list[tuple[Line, list[Method]]]) -> Iterator[list[tuple[Line, list[Method]]]]:
    """All guests up and paused; ended with the block."""
    try:
        for line, _ in lines:
            line.boot()
        for line, _ in lines:
            if not line.serial.ready.wait(BOOT):
                raise RuntimeError(f"{line.label}: the guest was not up in {BOOT:g} s")
        for line, _ in lines:
            line.rest()
        yield lines
    finally:
        for line, _ in lines:
            line.end()
