"""Post-copy benchmark of pageferry and QEMU: `make bench-postcopy`, or `python -m benchmarks.postcopy [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.harness import machine
from benchmarks.harness.bench import Bench
from benchmarks.postcopy import accesses, guests, ledgers, tables

BENCH = Bench(
    name="postcopy",
    questions={"accesses": accesses.measure, "ledger": ledgers.measure, "guests": guests.measure},
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    machine.require("bench-postcopy", "rustc")
    sys.exit(BENCH.main())
