"""Tables and targets of the restore benchmark."""

from __future__ import annotations

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median, median_of
from benchmarks.harness.tables import Column, Target, at_most, table

GUEST: tuple[Column, ...] = (
    ("running after ms", "running-ms", 1, 1),
    ("command to RESUME ms", "command-to-resume-ms", 0, 1),
    ("QEMU start ms", "qemu-start-ms", 0, 1),
    ("first tick ms", "first-tick-ms", 0, 1),
    ("TTR(1 s, 80 %) ms", "ttr-ms", 0, 1),
    ("writes in 1st s, of usual", "first-second", 2, 1),
    ("faults", "faults", 0, 1),
    ("faults on missing pages", "missed", 0, 1),
    ("MiB read", "bytes-read", 0, 1 << 20),
    ("complete ms", "complete-ms", 0, 1),
)
ARENA: tuple[Column, ...] = (
    ("usable ms", "open-ms", 1, 1),
    ("access us", "access-us", 1, 1),
    ("complete ms", "complete-ms", 0, 1),
    ("faults", "faults", 0, 1),
)
FAULTS: tuple[Column, ...] = (
    ("bare loop us", "bare-us", 0, 1),
    ("pager us", "pager-us", 0, 1),
    ("ratio", "ratio", 2, 1),
)
SOONER = 20
"""Minimum ratio of QEMU's time until the guest runs to pageferry's."""


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### One guest of 1 GiB, all of it accessed",
        table(results["guests"], ("line", "method"), GUEST),
        "### Arenas",
        table(results["arenas"], ("GiB", "method"), ARENA),
        "### One fault of 64 KiB",
        table([run | {"what": "median of 1024 accesses"} for run in results["faults"]], ("what",), FAULTS),
    ]


def judge(results: Results) -> list[Target]:
    """Return all targets, in reading order."""
    running: dict[tuple[str, str], list[float]] = {}
    for run in results["guests"]:
        running.setdefault((run["line"], run["method"]), []).append(run["running-ms"])
    theirs, peer = min((median(found), method) for (line, method), found in running.items() if "mapped-ram" in method)
    ours = median(running["pageferry", "lazy"])
    opened = having(results["arenas"], method="lazy")
    return [
        Target(
            "guest running, relative to QEMU's fastest restore",
            f">= {SOONER} times faster than {theirs:.0f} ms ({peer})",
            f"{ours:.1f} ms = {theirs / ours:.1f} times",
            theirs >= SOONER * ours,
        ),
        at_most("fault latency, relative to a bare loop", median_of(results["faults"], "ratio"), 1.3, "x", 2),
        at_most(f"lazy arena of {opened[0]['GiB']:g} GiB usable", median_of(opened, "open-ms"), 20, "ms"),
    ]
