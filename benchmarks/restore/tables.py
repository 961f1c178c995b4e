"""Tables and targets of the restore benchmark."""

from __future__ import annotations

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median, median_of
from benchmarks.harness.tables import Column, Target, at_least, at_most, table

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
FILL: tuple[Column, ...] = (
    ("MiB stored", "stored-mib", 0, 1),
    ("fio MiB/s", "fio-mib-s", 0, 1),
    ("bare loop MiB/s", "bare-mib-s", 0, 1),
    ("pager, cold MiB/s", "cold-mib-s", 0, 1),
    ("pager, warm MiB/s", "warm-mib-s", 0, 1),
)
FAULT_THREADS: tuple[Column, ...] = (
    ("CPU us per fault", "cpu-ns", 1, 1000),
    ("lock waits per 1000 faults", "waits", 0, 1),
    ("waited us per fault", "waited-ns", 2, 1000),
    ("faults/s", "faults-s", 0, 1),
)
MAX_GROWTH = 1.3
"""Maximum ratio of the CPU time per fault with 64 threads to that with 4."""
FILL_PART = 0.8
"""Minimum rate of the pager, relative to the lower of the rates of fio and of the bare loop."""
SOONER = 20
"""Minimum ratio of the time until the guest runs with QEMU to the time with pageferry."""


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### One guest of 1 GiB, all of it accessed",
        table(results["guests"], ("line", "method"), GUEST),
        "### Arenas",
        table(results["arenas"], ("GiB", "method"), ARENA),
        "### Loading a whole image from a disk",
        table(results["fill"], ("contents",), FILL),
        "### One fault of 64 KiB",
        table([run | {"what": "median of 1024 accesses"} for run in results["faults"]], ("what",), FAULTS),
        "### Faults of several threads",
        table(results["fault-threads"], ("threads",), FAULT_THREADS),
    ]


def judge(results: Results) -> list[Target]:
    """Return all targets, in reading order."""
    running: dict[tuple[str, str], list[float]] = {}
    for run in results["guests"]:
        running.setdefault((run["line"], run["method"]), []).append(run["running-ms"])
    theirs, peer = min((median(found), method) for (line, method), found in running.items() if "mapped-ram" in method)
    ours = median(running["pageferry", "lazy"])
    fill = having(results["fill"], contents="incompressible")
    limit = min(median_of(fill, "fio-mib-s"), median_of(fill, "bare-mib-s"))
    complete = {key: median(found) for key, found in _complete(results).items()}
    whole, loader = min((found, method) for (line, method), found in complete.items() if line == "QEMU")
    eager = complete["pageferry", "eager"]
    few, many = (median_of(having(results["fault-threads"], threads=count), "cpu-ns") for count in (4, 64))
    opened = having(results["arenas"], method="lazy")
    return [
        Target(
            "guest running, relative to QEMU's fastest restore",
            f">= {SOONER} times faster than {theirs:.0f} ms ({peer})",
            f"{ours:.1f} ms = {theirs / ours:.1f} times",
            theirs >= SOONER * ours,
        ),
        Target(
            "all memory of the guest loaded, relative to QEMU's fastest restore",
            f"<= 1 x {whole:.0f} ms ({loader})",
            f"{eager:.0f} ms = {eager / whole:.2f} x",
            eager <= whole,
        ),
        at_least(
            f"incompressible image loaded from a disk, relative to fio or a bare loop ({limit:.0f} MiB/s)",
            median_of(fill, "cold-mib-s") / limit,
            FILL_PART,
            "x",
            2,
        ),
        at_most("fault latency, relative to a bare loop", median_of(results["faults"], "ratio"), 1.3, "x", 2),
        at_most("CPU time per fault, 64 threads relative to 4", many / few, MAX_GROWTH, "x", 2),
        at_most(f"lazy arena of {opened[0]['GiB']:g} GiB usable", median_of(opened, "open-ms"), 20, "ms"),
    ]


def _complete(results: Results) -> dict[tuple[str, str], list[float]]:
    """Return the times from the command until all memory is loaded, by line and method."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in results["guests"]:
        if run["complete-ms"] is not None:
            found.setdefault((run["line"], run["method"]), []).append(run["complete-ms"])
    return found
