"""Post-copy and hybrid moves beside QEMU's: `make bench-postcopy`, or `python benchmarks/postcopy.py [--quick]`.

Writes raw data and tables to benchmarks/results. The method is described in docs/benchmarks.md. The exit code is 0
unless something did not work; targets that are missed are printed, and no error.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import machine
from benchmarks.measuring.bench import Bench, Results
from benchmarks.measuring.statistics import median, values
from benchmarks.measuring.tables import Column, Target, at_most, table
from benchmarks.moving import late

COLUMNS: tuple[Column, ...] = (
    ("total ms", "total-ms", 0, 1),
    ("downtime ms", "downtime-ms", 0, 1),
    ("STOP to RESUME ms", "stop-to-resume-ms", 0, 1),
    ("guest silent ms", "silence-ms", 0, 1),
    ("work meanwhile, % of its rate", "work-percent", 0, 1),
    ("pages asked for", "requests", 0, 1),
    ("access waits, median us", "p50-us", 0, 1),
    ("99 % us", "p99-us", 0, 1),
    ("vCPU blocked ms", "blocked-ms", 0, 1),
    ("sent MiB", "transferred", 0, 1 << 20),
)


def render(results: Results) -> list[str]:
    """One table."""
    return ["### A guest that writes faster than the link", table(results["late"], ("line", "method"), COLUMNS)]


def judge(results: Results) -> list[Target]:
    """What hybrid is for."""
    runs = results["late"]
    once = late.once(runs) * 1e3
    hybrid = [run for run in runs if (run["line"], run["method"]) == ("pageferry", "hybrid")]
    given_up = next(run for run in runs if "ended" in run)
    return [
        at_most(
            f"hybrid, against sending the memory once ({once:.0f} ms)",
            median(values(hybrid, "total-ms")) / once,
            2,
            "x",
            2,
        ),
        Target(
            "QEMU's pre-copy of the same guest",
            f"does not end in {late.PATIENCE:g} x",
            "ended" if given_up["ended"] else f"{given_up['rounds']} rounds, and no end",
            not given_up["ended"],
        ),
    ]


BENCH = Bench(name="postcopy", questions={"late": late.measure}, judge=judge, tables=render)

if __name__ == "__main__":
    machine.require("bench-postcopy", "rustc")
    sys.exit(BENCH.main())
