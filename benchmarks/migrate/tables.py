"""Tables of the migration benchmark."""

from __future__ import annotations

from benchmarks.harness.bench import Results
from benchmarks.harness.tables import Column, Run, table

GUEST: tuple[Column, ...] = (
    ("total ms", "total-ms", 0, 1),
    ("command to RESUME ms", "elapsed-ms", 0, 1),
    ("reported downtime ms", "downtime-ms", 0, 1),
    ("STOP to RESUME ms", "stop-to-resume-ms", 0, 1),
    ("guest silent ms", "silence-ms", 0, 1),
    ("CPU s", "cpu-s", 2, 1),
    ("CPU s of QEMU", "qemu-cpu-s", 2, 1),
    ("CPU s without starts of Python", "own-cpu-s", 2, 1),
    ("sent MiB", "transferred", 0, 1 << 20),
    ("2M source", "large-source", 0, 1),
    ("2M destination", "large-destination", 0, 1),
    ("faults 1st s", "faults-first-second", 0, 1),
)
POPULATE: tuple[Column, ...] = (
    ("faults 1st s", "faults-first-second", 0, 1),
    ("downtime ms", "downtime-ms", 0, 1),
    ("populate, hidden ms", "work-ms", 1, 1),
    ("populate, waited for ms", "populate-ms", 1, 1),
    ("2M destination", "large-destination", 0, 1),
)
GUEST_POPULATE = (*POPULATE, ("first 1000 writes ms", "first-writes-ms", 0, 1))
LEDGER_POPULATE = (*POPULATE, ("longest write us", "longest-write-us", 0, 1), ("writes >= 16 us", "slow-writes", 0, 1))
STALLS: tuple[Column, ...] = (
    ("longest stall us", "longest-us", 0, 1),
    ("writes/s", "writes-per-second", 0, 1),
    ("install ms", "install-ms", 1, 1),
    ("MiB modified per round", "dirty-mib-per-round", 1, 1),
)
THROUGHPUT: tuple[Column, ...] = (
    ("first round Mbit/s", "first-round-mbps", 0, 1),
    ("iperf3 Mbit/s", "iperf3-mbps", 0, 1),
    ("ratio", "ratio", 2, 1),
    ("total ms", "total-ms", 0, 1),
)


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### One guest of 1 GiB, 200 MiB of it in use",
        table([run for run in results["guests"] if run["alive"]], ("accel", "load", "line", "method"), GUEST),
        "### An incompressible arena and iperf3",
        table([run | {"what": "1 GiB, one stream"} for run in results["throughput"]], ("what",), THROUGHPUT),
        "### Page tables and huge pages: the guest",
        table([_populated(run) for run in results["populate"]], ("populate", "large-pages-option"), GUEST_POPULATE),
        "### Page tables and huge pages: the built-in workload",
        table([_populated(run) for run in results["ledger"]], ("populate", "large-pages-option"), LEDGER_POPULATE),
        "### Write traces",
        table(results["stalls"], ("pattern", "granularity"), STALLS),
    ]


def _populated(run: Run) -> Run:
    return run | {"work-ms": run["populated"]["work-ms"], "populate-ms": run["downtime-parts"]["populate"]}
