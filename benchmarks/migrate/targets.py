"""Targets of the migration benchmark."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Target

PEERS = ("precopy", "multifd")


def best(runs: list[dict[str, Any]], load: str, key: str, methods: tuple[str, ...]) -> tuple[float, str]:
    """Return the smallest median of a key over lines and methods, with the name of its line."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["load"] == load and run["method"] in methods and run["alive"]:
            groups.setdefault(f"{run['line']}, {run['method']}", []).append(run)
    return min((median_of(group, key), name) for name, group in groups.items())


def judge(results: Results) -> list[Target]:
    """Return all targets, in reading order."""
    guests = results["guests"]
    found = []
    for load in ("busy", "idle"):
        found += [
            _at_most(guests, load, "total-ms", 0.2, "total time"),
            _at_most(guests, load, "stop-to-resume-ms", 1.0, "downtime (STOP to RESUME)"),
        ]
    ratio = median_of(results["throughput"], "ratio")
    found.append(
        Target("incompressible arena, one stream, checksums", ">= 60 % of iperf3", f"{ratio:.0%}", ratio >= 0.6)
    )
    ours = having(guests, method="pageferry")
    kept = all(run["large-destination"] >= run["large-source"] for run in ours)
    words = ", ".join(sorted({f"{run['large-source']} -> {run['large-destination']}" for run in ours}))
    found.append(Target("huge pages of the guest, source -> destination", "as many", words, kept))
    arena = [run for run in results["ledger"] if (run["populate"], run["large-pages-option"]) == ("all", "keep")]
    faults = median_of(arena, "faults-first-second")
    found.append(Target("faults of the built-in workload in the first second", "<= 5", f"{faults:.0f}", faults <= 5))
    return found


def _at_most(guests: list[dict[str, Any]], load: str, key: str, part: float, what: str) -> Target:
    theirs, peer = best(guests, load, key, PEERS)
    ours, _ = best(guests, load, key, ("pageferry",))
    wanted = f"<= {part:g} x {theirs:.0f} ms ({peer})"
    return Target(f"{what}, {load} guest", wanted, f"{ours:.0f} ms = {ours / theirs:.2f} x", ours <= part * theirs)
