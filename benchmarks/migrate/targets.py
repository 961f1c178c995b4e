"""Targets of the migration benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Target
from benchmarks.migrate.side_by_side import SCRIPTED

PEERS = ("precopy", "multifd")
MAX_SHORTEST = 1.5
"""Maximum ratio of pageferry's pause to the shortest pause of any line of QEMU."""
MAX_COMMAND = 1.2
MAX_CPU = 1.3
MIN_OF_IPERF = 0.7


class Group(NamedTuple):
    """All runs of one line with one method that are compared: the repeated runs, if there are any."""

    name: str
    runs: list[dict[str, Any]]

    def median(self, key: str) -> float:
        """Return the median of a key."""
        return median_of(self.runs, key)


def groups(runs: list[dict[str, Any]], *methods: str) -> list[Group]:
    """Return the runs of these methods by line. If any runs are repetitions, only lines with repetitions count."""
    alive = [run for run in runs if run["method"] in methods and run["alive"]]
    compared = [run for run in alive if run["chosen"]] or alive
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in compared:
        by_name.setdefault(f"{run['line']}, {run['method']}", []).append(run)
    return [Group(*item) for item in by_name.items()]


def judge(results: Results) -> list[Target]:
    """Return all targets, in reading order."""
    guests = results["guests"]
    cases = list(dict.fromkeys((run["accel"], run["load"]) for run in guests))
    found = [
        target for accel, load in cases for target in _guest(having(guests, accel=accel, load=load), f"{accel}, {load}")
    ]
    ratio = median_of(results["throughput"], "ratio")
    found.append(
        Target(
            "incompressible arena, one stream, checksums",
            f">= {MIN_OF_IPERF:.0%} of iperf3",
            f"{ratio:.0%}",
            ratio >= MIN_OF_IPERF,
        )
    )
    ours = having(guests, method="pageferry")
    kept = all(run["large-destination"] >= run["large-source"] for run in ours)
    words = ", ".join(sorted({f"{run['large-source']} -> {run['large-destination']}" for run in ours}))
    found.append(Target("huge pages of the guest, source -> destination", "as many", words, kept))
    arena = [run for run in results["ledger"] if (run["populate"], run["large-pages-option"]) == ("all", "keep")]
    faults = median_of(arena, "faults-first-second")
    found.append(Target("faults of the built-in workload in the first second", "<= 5", f"{faults:.0f}", faults <= 5))
    return found


def _guest(runs: list[dict[str, Any]], case: str) -> Iterator[Target]:
    """Yield the targets for guests with one accelerator under one load."""
    peers = groups(runs, *PEERS)
    (ours,) = groups(runs, "pageferry")[:1]
    total, pause = ours.median("total-ms"), ours.median("stop-to-resume-ms")
    fastest = min(peers, key=lambda peer: peer.median("total-ms"))
    every = [run for run in runs if run["method"] in PEERS and run["alive"]]
    shortest = min(peers, key=lambda peer: peer.median("stop-to-resume-ms"))
    better = [
        peer.name for peer in peers if peer.median("total-ms") < total and peer.median("stop-to-resume-ms") < pause
    ]
    yield Target(
        f"lines of QEMU with both a shorter total and a shorter pause ({case})",
        f"none of {len({(run['line'], run['method']) for run in every})}",
        "; ".join(better) or "none",
        not better,
    )
    yield _at_most(f"total time ({case})", total, 1.0, fastest, "total-ms")
    yield _at_most(f"STOP to RESUME, relative to the fastest line ({case})", pause, 1.0, fastest, "stop-to-resume-ms")
    yield _at_most(
        f"STOP to RESUME, relative to the shortest ({case})", pause, MAX_SHORTEST, shortest, "stop-to-resume-ms"
    )
    yield _at_most(
        f"CPU time, starts of Python apart ({case})", ours.median("own-cpu-s"), MAX_CPU, fastest, "own-cpu-s"
    )
    for script in groups(runs, SCRIPTED[0])[:1]:
        elapsed = ours.median("elapsed-ms")
        yield _at_most(f"command to RESUME ({case})", elapsed, MAX_COMMAND, script, "elapsed-ms")


def _at_most(what: str, ours: float, part: float, peer: Group, key: str) -> Target:
    theirs = peer.median(key)
    unit, digits = ("s", 2) if key.endswith("-s") else ("ms", 0)
    wanted = f"<= {part:g} x {theirs:.{digits}f} {unit} ({peer.name})"
    return Target(what, wanted, f"{ours:.{digits}f} {unit} = {ours / theirs:.2f} x", ours <= part * theirs)
