"""Benchmark of streams, TLS and high-latency links: `make bench-links`, or `python -m benchmarks.links [--quick]`.

The benchmark writes raw data and tables to benchmarks/results. docs/benchmarks.md describes the method. The exit code
is 0 unless an operation failed. Missed targets are printed, but are not errors.
"""

from __future__ import annotations

import sys

from benchmarks.harness import machine
from benchmarks.harness.bench import Bench, Results
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Column, Target, at_least, table
from benchmarks.links import loopback, networks

LOOPBACK: tuple[Column, ...] = (
    ("first round Mbit/s", "first-round-mbps", 0, 1),
    ("of one iperf3 stream", "ratio", 2, 1),
    ("total ms", "total-ms", 0, 1),
    ("downtime ms", "downtime-ms", 0, 1),
)
NETWORKS: tuple[Column, ...] = (
    ("total ms", "total-ms", 0, 1),
    ("downtime ms", "downtime-ms", 0, 1),
    ("Mbit/s", "mbps", 0, 1),
    ("one iperf3 stream Mbit/s", "iperf3-mbps", 0, 1),
    ("sent MiB", "transferred", 1, 1 << 20),
    ("pages requested", "requests", 0, 1),
    ("access waits, median us", "p50-us", 0, 1),
    ("99 % us", "p99-us", 0, 1),
)
KEPT = 65.0
"""Minimum throughput with TLS, as a percentage of the throughput without TLS."""


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### Loopback: streams, unencrypted and with TLS",
        table(results["loopback"], ("link", "streams"), LOOPBACK),
        "### Long, slow and lossy links",
        table(results["networks"], ("link", "method"), NETWORKS),
    ]


def judge(results: Results) -> list[Target]:
    """Return the targets for the cost of TLS."""
    measured = sorted({run["streams"] for run in results["loopback"]})
    rates = {
        (link, streams): median_of(having(results["loopback"], link=link, streams=streams), "first-round-mbps")
        for link in ("plain", "TLS")
        for streams in measured
    }
    return [
        at_least(
            f"throughput with TLS, {streams} stream{'s' * (streams > 1)}",
            rates["TLS", streams] / rates["plain", streams] * 100,
            KEPT,
            "%",
            0,
        )
        for streams in measured
    ]


BENCH = Bench(
    name="links",
    questions={"loopback": loopback.measure, "networks": networks.measure},
    judge=judge,
    tables=render,
)

if __name__ == "__main__":
    machine.require("bench-links", "iperf3", "nsenter")
    sys.exit(BENCH.main())
