"""Migration benchmark of pageferry and QEMU: `make bench-migrate`, or `python -m benchmarks.migrate [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.harness import machine
from benchmarks.harness.bench import Bench
from benchmarks.migrate import populate, side_by_side, stalls, tables, targets, throughput

BENCH = Bench(
    name="migrate",
    questions={
        "guests": side_by_side.measure,
        "throughput": throughput.measure,
        "populate": populate.measure_guest,
        "ledger": populate.measure_ledger,
        "stalls": stalls.measure,
    },
    judge=targets.judge,
    tables=tables.render,
    repetitions=5,
)

if __name__ == "__main__":
    machine.require("bench-migrate", "iperf3", "rustc")
    sys.exit(BENCH.main())
