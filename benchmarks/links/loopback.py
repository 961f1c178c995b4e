"""Throughput of migration over loopback with incompressible memory: unencrypted and with TLS, by number of streams."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate import trips
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.trips import Ends
from benchmarks.peers import iperf
from tests import certificates

FULL, SMALL = 1 << 30, 32 << 20
CALM = {"rate": 1 << 20, "working_set": 0.01}
"""Options of a workload that writes little, so that the first round sends nearly all data."""
STREAMS, QUICK_STREAMS = (1, 2, 4), (1, 4)
"""Numbers of streams; the second value is for --quick."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure all numbers of streams, unencrypted and with TLS, in turn."""
    source, receiver = certificates.hosts(setting.folder / "certificates")
    ends = {"plain": Ends(), "TLS": Ends(sending=("--tls", str(source)), receiving=("--tls", str(receiver)))}
    size = SMALL if setting.quick else FULL
    runs: list[dict[str, Any]] = []
    with Ledger("streams", size, CALM) as ledger, Ballast(size + (128 << 20)) as ballast:
        for _ in range(setting.repetitions):
            rate = iperf.one_stream(1 if setting.quick else 2)
            for streams in QUICK_STREAMS if setting.quick else STREAMS:
                for link, each in ends.items():
                    run = trips.move(ledger, ballast, ("--streams", str(streams)), each)
                    runs.append({"link": link, "streams": streams, "iperf3-mbps": rate} | run)
    for run in runs:
        run["ratio"] = run["first-round-mbps"] / run["iperf3-mbps"]
    return runs
