"""Checkpoint benchmark, with peers: `make bench-checkpoint`, or `python benchmarks/checkpoint.py [--quick]`.

Writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code is 0 unless an
operation failed; missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import machine
from benchmarks.measuring.bench import Bench
from benchmarks.saving import guests, ledgers, tables

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
