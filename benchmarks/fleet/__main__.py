"""Fleet benchmark: `make bench-fleet`, or `python -m benchmarks.fleet [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.fleet import simulated, tables
from benchmarks.harness.bench import Bench

BENCH = Bench(
    name="fleet",
    questions={"plans": simulated.plans, "evacuations": simulated.evacuations},
    judge=tables.judge,
    tables=tables.render,
)

if __name__ == "__main__":
    sys.exit(BENCH.main())
