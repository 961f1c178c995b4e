"""Checkpoints of the built-in workload: effect on its writer, parts of the pause, cost of a second checkpoint."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.guests import OURS, told_by
from benchmarks.harness import examples
from benchmarks.harness.bench import Setting
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import expect, pageferry, reap
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.open import open_workload

FULL, SMALL = 1 << 30, 64 << 20
CODED = 4 << 20
"""Size of the arena that compares codecs with --quick, bytes. It is small: the debug build of a codec is slow."""
CONTENTS = {"compressible": 0.5, "zero_fraction": 0.1}
LOADS: dict[str, dict[str, Any]] = {"20 MiB/s": {"rate": 20 << 20}, "as fast as it can": {}}
CODECS = ("none", "lz4", "zstd")
USUAL = 1.0
"""Seconds before the checkpoint in which the usual rate is measured."""
GIB = (1, 4)
"""Sizes of the arenas whose pause is measured, GiB."""
SPARSE = {"rate": 4 << 20, "working_set": 0.02, "scatter": True}
"""Options of the writer between two checkpoints of a chain."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure lazy and stopped checkpoints under both loads."""
    runs = []
    for load, options in setting.chosen(list(LOADS.items())):
        with Ledger("saved", SMALL if setting.quick else FULL, CONTENTS | options) as ledger:
            for _ in range(setting.repetitions):
                for method, words in OURS.items():
                    run = asyncio.run(save(ledger, setting.folder / "image", *words, period=setting.period(USUAL)))
                    runs.append({"load": load, "method": method} | run)
    return runs


def measure_codecs(setting: Setting) -> list[dict[str, Any]]:
    """Measure, for each codec, the rate at which data is saved and the speed of the codec alone on the same pages."""
    runs = []
    image = setting.folder / "image"
    with Ledger("coded", CODED if setting.quick else FULL, CONTENTS | LOADS["20 MiB/s"]) as ledger:
        for _ in range(setting.repetitions):
            for codec in CODECS:
                run = {"codec": codec} | asyncio.run(
                    save(ledger, image, "--codec", codec, period=setting.period(USUAL))
                )
                alone = examples.codec_speed(image, codec, setting.quick)
                runs.append(run | {"codec-mib-s": alone, "of-codec": run["saved-mib-s"] / alone})
    return runs


def measure_pause(setting: Setting) -> list[dict[str, Any]]:
    """Measure the pause for each arena size while the writer keeps writing."""
    runs = []
    for gib in setting.chosen(GIB):
        size = SMALL if setting.quick else gib << 30
        parts = size / (1 << 30)
        with Ledger("paused", size, CONTENTS | LOADS["20 MiB/s"]) as ledger:
            for _ in range(setting.repetitions):
                run = asyncio.run(save(ledger, setting.folder / "image", period=setting.period(USUAL)))
                runs.append({"GiB": parts, "pause-ms-per-gib": run["own-pause-ms"] / parts} | run)
    return runs


def measure_increments(setting: Setting) -> list[dict[str, Any]]:
    """Measure a checkpoint, and an incremental checkpoint a second later."""
    runs = []
    period = setting.period(USUAL)
    parent, child = setting.folder / "parent", setting.folder / "child"
    with Ledger("chained", SMALL if setting.quick else FULL, CONTENTS | SPARSE) as ledger:
        for _ in range(setting.repetitions):
            runs.append({"checkpoint": "first"} | asyncio.run(save(ledger, parent, period=period)))
            time.sleep(1)
            run = asyncio.run(save(ledger, child, "--parent", str(parent), period=period))
            runs.append({"checkpoint": "second, with parent"} | run)
    return runs


async def save(ledger: Ledger, image: Path, *words: str, period: float = USUAL) -> dict[str, Any]:
    """Take one checkpoint. Return its figures and the statistics of the writer.

    The usual write rate is measured for `period` seconds before the checkpoint.
    """
    workload = await open_workload(ledger.name)
    assert isinstance(workload, RemoteArena)
    try:
        usual = await _rate(workload, asyncio.sleep(period))
        process = pageferry("checkpoint", ledger.name, str(image), "--output", "json", *words)
        await asyncio.to_thread(expect, process, "armed")
        saving = asyncio.to_thread(expect, process, "checkpoint")
        found = await _rate(workload, saving)
        reap(process)
    finally:
        workload.close()
    return told_by(found["result"]) | {
        "usual-writes-s": usual["rate"],
        "slowdown-percent": (1 - found["rate"] / usual["rate"]) * 100,
        "longest-write-us": found["longest-us"],
    }


async def _rate(workload: RemoteArena, work: Any) -> dict[str, Any]:
    """Await `work`. Return its result, the writes per second during `work`, and the longest write, microseconds."""
    before, began = await workload.report(), time.perf_counter()
    result = await work
    after, ended = await workload.report(), time.perf_counter()
    return {
        "rate": (int(str(after["writes"])) - int(str(before["writes"]))) / (ended - began),
        "longest-us": int(str(after["longest-stall-ns"])) / 1e3,
        "result": result,
    }
