"""Checkpoints of running workloads (S4), execution during a restore (S10), and access to deferred pages (S8)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoint import guests as saving
from benchmarks.checkpoint import ledgers
from benchmarks.harness.bench import Setting
from benchmarks.migrate.ledger import Ledger
from benchmarks.restore import arenas
from benchmarks.restore import guests as restoring
from benchmarks.systems.row import Row, Switches

FULL, SMALL = 1 << 30, 64 << 20
LAZY, STOPPED = "--mode=lazy", "--mode=stop"


def guest(setting: Setting, switches: Switches) -> list[Row]:
    """Save and restore a guest by pageferry and by QEMU."""
    place, words = saving.guest(setting, restoring.RATE, restoring.HOT)
    mebibytes = saving.SMALL if setting.quick else saving.FULL
    image, other, mapped = (setting.folder / name for name in ("image", "other", "mapped"))
    with saving.guests(place, words, "shown") as (ours, theirs):
        period, watched = setting.period(saving.USUAL), restoring.period(setting)
        stopped = saving.watched(ours, lambda: saving.save(ours, other, STOPPED), period)
        mode = switches.choose("S4", LAZY, STOPPED)
        saves = [saving.watched(ours, lambda: saving.save(ours, image, mode), period) for _ in range(_times(setting))]
        snapshot = saving.watched(theirs, lambda: saving.save_by_qemu(theirs, other, ("background-snapshot",)), period)
        saving.watched(theirs, lambda: saving.save_by_qemu(theirs, mapped, ("mapped-ram", "multifd")), period)
        ours.end()
        theirs.end()
        usual = saves[-1]["usual-writes-s"]
        first = restoring.restore(ours, image, usual, watched=watched)
        second = restoring.restore(ours, image, usual, "--eager", watched=watched) if "S10" in switches.off else first
        incoming = restoring.restore_by_qemu(theirs, mapped, usual, ("mapped-ram", "multifd"), watched=watched)
    what = f"QEMU guest, {mebibytes} MiB accessed"
    peer = incoming["running-ms"]
    complete = _until_complete(first)
    running = _until_complete(second) if "S10" in switches.off else first["running-ms"]
    beside = median(run["beside-state-ms"] for run in saves)
    return [
        Row("S4", what, "pause without device state, ms", stopped["beside-state-ms"], beside, "at most 5",
            beside <= 5, snapshot["pause-ms"], "QEMU's background-snapshot, whole pause"),
        Row("S10", what, "ms until it runs", complete, running, "at most a twentieth of QEMU's",
            running <= peer / 20, peer, "QEMU, mapped-ram and multifd"),
    ]  # fmt: skip


def arena(setting: Setting, switches: Switches) -> list[Row]:
    """Save the built-in workload, and open its image in another program (S4, S10, S8)."""
    size = SMALL if setting.quick else FULL
    image = setting.folder / "image"
    with Ledger("kept", size, ledgers.CONTENTS | ledgers.LOADS["20 MiB/s"]) as ledger:
        stopped = _save(ledger, image, STOPPED)
        mode = switches.choose("S4", LAZY, STOPPED)
        lazy = median(_save(ledger, image, mode) for _ in range(_times(setting)))
    whole = arenas.opened(image, "whole")
    peeked = arenas.opened(image, switches.choose("S8", "peek", "whole"))
    eager = arenas.opened(image, "eager")
    opened = arenas.opened(image, switches.choose("S10", "lazy", "eager"))
    gib = size / (1 << 30)
    what = f"arena of {size >> 20} MiB"
    limit = max(2 * gib, 1)
    return [
        Row("S4", f"{what}, 20 MiB/s written", "pause, ms", stopped, lazy, "at most 2 per GiB", lazy <= limit),
        Row("S8", f"{what}, restored, one page printed", "MiB of the image read", _mib(whole), _mib(peeked),
            "at most a twentieth of that without", _mib(peeked) <= _mib(whole) / 20),
        Row("S10", f"{what}, opened by a program", "ms until it is usable", eager["open-ms"], opened["open-ms"],
            "at most 20", opened["open-ms"] <= 20),
    ]  # fmt: skip


def _times(setting: Setting) -> int:
    """Return the number of measurements of a short pause. Other processes may disturb a single measurement."""
    return 1 if setting.quick else 3


def _save(ledger: Ledger, image: Path, option: str) -> float:
    found: dict[str, Any] = asyncio.run(ledgers.save(ledger, image, option))
    return float(found["own-pause-ms"])


def _until_complete(run: dict[str, Any]) -> float:
    """Return the time until all memory is loaded, milliseconds. Like `running-ms`, it excludes the start of QEMU."""
    return float(run["complete-ms"] - run["command-to-resume-ms"] + run["running-ms"])


def _mib(found: dict[str, Any]) -> float:
    return float(found["bytes-read"] / (1 << 20))
