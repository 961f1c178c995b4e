"""Post-copy benchmark, with QEMU as peer: `make bench-postcopy`, or `python benchmarks/postcopy.py [--quick]`.

Writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code is 0 unless an
operation failed; missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.arriving import accesses, guests, ledgers, tables
from benchmarks.measuring import machine
from benchmarks.measuring.bench import Bench

BENCH = Bench(
    name="postcopy",
    questions={"accesses": accesses.measure, "ledger": ledgers.measure, "guests": guests.measure},
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    machine.require("bench-postcopy", "rustc")
    sys.exit(BENCH.main())
