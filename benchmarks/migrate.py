"""Migration benchmark, with peers: `make bench-migrate`, or `python benchmarks/migrate.py [--quick]`.

Writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code is 0 unless an
operation failed; missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import machine
from benchmarks.measuring.bench import Bench
from benchmarks.moving import populate, side_by_side, stalls, tables, targets, throughput

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
)

if __name__ == "__main__":
    machine.require("bench-migrate", "iperf3", "rustc")
    sys.exit(BENCH.main())
