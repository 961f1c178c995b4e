"""Restore benchmark of pageferry and QEMU: `make bench-restore`, or `python -m benchmarks.restore [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.harness import machine
from benchmarks.harness.bench import Bench
from benchmarks.restore import arenas, fill, guests, tables

BENCH = Bench(
    name="restore",
    questions={
        "guests": guests.measure,
        "arenas": arenas.measure,
        "fill": fill.measure,
        "faults": arenas.measure_faults,
        "fault-threads": arenas.measure_fault_threads,
    },
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    machine.require("bench-restore", "rustc", "cargo", "fio")
    sys.exit(BENCH.main())
