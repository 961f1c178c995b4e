"""Checkpoint benchmark of pageferry and QEMU: `make bench-checkpoint`, or `python -m benchmarks.checkpoint [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.checkpoint import guests, ledgers, tables
from benchmarks.harness import machine
from benchmarks.harness.bench import Bench

BENCH = Bench(
    name="checkpoint",
    questions={
        "guests": guests.measure,
        "ledger": ledgers.measure,
        "codecs": ledgers.measure_codecs,
        "pause": ledgers.measure_pause,
        "increments": ledgers.measure_increments,
    },
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    machine.require("bench-checkpoint", "rustc", "cargo")
    sys.exit(BENCH.main())
