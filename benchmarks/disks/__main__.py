"""Benchmark of guests with disks: `make bench-disks`, or `python -m benchmarks.disks [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.disks import mirrored, pauses, tables
from benchmarks.harness import machine
from benchmarks.harness.bench import Bench

BENCH = Bench(
    name="disks",
    questions={"pauses": pauses.measure, "mirrored": mirrored.measure},
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    machine.require("bench-disks")
    sys.exit(BENCH.main())
