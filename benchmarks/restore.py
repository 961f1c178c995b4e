"""Restore benchmark, with peers: `make bench-restore`, or `python benchmarks/restore.py [--quick]`.

Writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code is 0 unless an
operation failed; missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import machine
from benchmarks.measuring.bench import Bench
from benchmarks.restoring import arenas, guests, tables

BENCH = Bench(
    name="restore",
    questions={"guests": guests.measure, "arenas": arenas.measure, "faults": arenas.measure_faults},
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    machine.require("bench-restore", "rustc", "cargo")
    sys.exit(BENCH.main())
