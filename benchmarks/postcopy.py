"""Moves before all pages are there, beside QEMU's: `make bench-postcopy`, or `python benchmarks/postcopy.py [--quick]`.

Writes raw data and tables to benchmarks/results. The method is described in docs/benchmarks.md. The exit code is 0
unless something did not work; targets that are missed are printed, and no error.
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
