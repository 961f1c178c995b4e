"""Throughput of one page stream with checksums and incompressible memory, compared with that of one iperf3 stream."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import Process, expect, pageferry
from benchmarks.peers import iperf

FULL, SMALL = 1 << 30, 64 << 20


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Migrate one arena repeatedly. Measure iperf3 before each migration."""
    runs = []
    size = SMALL if setting.quick else FULL
    with (
        Ballast(size + (128 << 20)) as ballast,
        Ledger("arena", size, {"rate": 1 << 20, "working_set": 0.01}) as ledger,
    ):
        for _ in range(setting.repetitions):
            ballast.hold()
            rate = iperf.one_stream()
            runs.append(_move(ledger, ballast) | {"iperf3-mbps": rate})
    for run in runs:
        run["ratio"] = run["first-round-mbps"] / run["iperf3-mbps"]
    return runs


def _move(ledger: Ledger, ballast: Ballast) -> dict[str, Any]:
    ledger.prepare()
    ballast.release()
    words = ("migrate", ledger.name, ledger.address, "--streams", "1", "--output", "json")
    sender: Process = pageferry(*words)
    assert sender.stdout is not None
    first = expect(sender, "round")
    told = expect(sender, "migration")
    sender.stdout.close()
    if sender.wait():
        raise RuntimeError(f"cannot migrate {ledger.name}: pageferry exited with code {sender.returncode}")
    ledger.moved()
    return {
        "first-round-mbps": first["mbps"],
        "first-round-ms": first["ms"],
        "total-ms": told["total-time"],
        "mbps": told["mbps"],
        "downtime-ms": told["downtime"],
    }
