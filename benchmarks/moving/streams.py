"""What TLS costs, and what more page streams bring: one arena, moved again and again in every way."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring.ballast import Ballast
from benchmarks.moving.ledger import Ledger
from benchmarks.moving.throughput import SIZE, move
from tests.certificates import hosts

STREAMS = (1, 2, 4)


def measure(ballast: Ballast, repetitions: int) -> list[dict[str, Any]]:
    """Every number of streams in the clear and under TLS, one right after the other; then all of it again."""
    runs = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-tls-") as folder,
        Ledger("streams", SIZE, {"rate": 1 << 20, "working_set": 0.01}) as ledger,
    ):
        source, receiver = hosts(Path(folder))
        for _ in range(repetitions):
            for streams in STREAMS:
                for tls in ("off", "on"):
                    ballast.hold()
                    ends = (["--tls", str(source)], ["--tls", str(receiver)]) if tls == "on" else ([], [])
                    told = move(ledger, ballast, ["--streams", str(streams), *ends[0]], ends[1])
                    runs.append({"streams": str(streams), "tls": tls} | told)
    return runs
