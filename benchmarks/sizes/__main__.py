"""Benchmark of checkpoint block sizes: `make bench-sizes`, or `python -m benchmarks.sizes [--quick]`.

The benchmark varies the sizes of trap blocks, page blocks and storage blocks one at a time. It measures their effect on
the workload, the checkpoint and a later restore. The defaults were chosen from these results (docs/format.md,
docs/systems/s4.md).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.checkpoint import ledgers
from benchmarks.harness import machine
from benchmarks.harness.bench import Bench, Results, Setting
from benchmarks.harness.tables import Column, Target, table
from benchmarks.migrate.ledger import Ledger
from benchmarks.restore import arenas
from pageferry.checkpoints.options import KIB, MIB, Options

FULL, SMALL = 512 << 20, 64 << 20
SIZES = {
    "trap-block": (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB),
    "page-block": (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB),
    "storage-block": (64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB),
}
DEFAULTS = {name: getattr(Options(), name.replace("-", "_")) for name in SIZES}
LOADS = {"20 MiB/s, all over": {"rate": 20 << 20, "working_set": 0.9, "scatter": True}, "as fast as it can": {}}
COLUMNS: tuple[Column, ...] = (
    ("slowdown %", "slowdown-percent", 1, 1),
    ("traps", "traps", 0, 1),
    ("mean trap us", "trap-us", 0, 1),
    ("longest write us", "longest-write-us", 0, 1),
    ("saved MiB/s", "saved-mib-s", 0, 1),
    ("mean write KiB", "mean-write", 0, 1 << 10),
    ("compression", "compression", 2, 1),
    ("access us", "access-us", 0, 1),
    ("KiB read per access", "read-kib", 0, 1),
)


def choices() -> Iterator[tuple[str, int, dict[str, int]]]:
    """Yield the name of the varied size, its value, and all sizes."""
    for name, sizes in SIZES.items():
        for size in sizes:
            chosen = DEFAULTS | {name: size}
            chosen["storage-block"] = max(chosen["storage-block"], chosen["page-block"])
            yield name, size, chosen


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Take a checkpoint with each size in turn under each load, and read random pages from each image."""
    runs = []
    image = setting.folder / "image"
    for load, options in LOADS.items():
        with Ledger("sized", SMALL if setting.quick else FULL, ledgers.CONTENTS | options) as ledger:
            for _ in range(setting.repetitions):
                for name, size, sizes in setting.chosen(list(choices())):
                    words = [f"--{each}={value}" for each, value in sizes.items()]
                    run = asyncio.run(ledgers.save(ledger, image, *words, period=setting.period(ledgers.USUAL)))
                    mark = ", default" if size == DEFAULTS[name] else ""
                    runs.append({"load": load, "size": f"{name} {size // KIB}K{mark}"} | run | arenas.demanded(image))
    return runs


def render(results: Results) -> list[str]:
    """Return a heading and a table."""
    return ["### One size varied at a time", table(results["sizes"], ("load", "size"), COLUMNS)]


def judge(_: Results) -> list[Target]:
    """Return no targets: the table serves to choose defaults."""
    return []


BENCH = Bench(name="sizes", questions={"sizes": measure}, judge=judge, tables=render)

if __name__ == "__main__":
    machine.require("bench-sizes")
    sys.exit(BENCH.main())
