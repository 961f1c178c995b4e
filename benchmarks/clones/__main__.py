"""Clone benchmark: `make bench-clones`, or `python -m benchmarks.clones [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.clones import checkpoints, guests, migrations, tables
from benchmarks.harness import machine
from benchmarks.harness.bench import Bench

BENCH = Bench(
    name="clones",
    questions={"guests": guests.measure, "checkpoints": checkpoints.measure, "migrations": migrations.measure},
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    machine.require("bench-clones", "rustc", "cargo")
    sys.exit(BENCH.main())
