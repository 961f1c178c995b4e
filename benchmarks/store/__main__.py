"""Store benchmark: `make bench-store`, or `python -m benchmarks.store [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.harness import machine
from benchmarks.harness.bench import Bench
from benchmarks.store import arenas, encryption, guests, requests, tables

BENCH = Bench(
    name="store",
    questions={
        "requests": requests.measure,
        "arenas": arenas.measure,
        "encryption": encryption.measure,
        "guests": guests.measure,
    },
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    machine.require("bench-store", "rustc", "cargo", "iperf3", "nsenter")
    sys.exit(BENCH.main())
