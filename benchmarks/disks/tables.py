"""Tables and targets of the benchmark of disks."""

from __future__ import annotations

from benchmarks.disks import mirrored
from benchmarks.disks.pauses import NO_DISK
from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Column, Run, Target, at_most, table

MAX_RATIO = 2
"""Maximum ratio of a median pause to the pause of the guest without a writable disk."""
MAX_MIRRORED = 1.1
"""Maximum total time and downtime of a mirrored migration, relative to the steps of QEMU."""
COLUMNS: tuple[Column, ...] = (
    ("STOP to RESUME ms", "pause-ms", 1, 1),
    ("ratio", "ratio", 2, 1),
    ("pause ms", "own-pause-ms", 1, 1),
    ("device state ms", "device-state-ms", 1, 1),
    ("total ms", "total-ms", 0, 1),
    ("dirty MiB", "dirty-mib", 0, 1),
)
MIRRORED: tuple[Column, ...] = (
    ("total ms", "elapsed-ms", 0, 1),
    ("downtime ms", "stop-to-resume-ms", 0, 1),
    ("longest silence ms", "silence-ms", 0, 1),
)


def render(results: Results) -> list[str]:
    """Return headings and tables of all measurements that were made."""
    parts: list[str] = []
    if "pauses" in results:
        runs = _with_ratios(results["pauses"])
        parts += ["### Pauses of checkpoints, disk of 50 MB/s", table(runs, ("method", "dirty"), COLUMNS)]
    if "mirrored" in results:
        parts += ["### Migration with two local disks", table(results["mirrored"], ("method",), MIRRORED)]
    return parts


def judge(results: Results) -> list[Target]:
    """Return the targets of all measurements that were made."""
    pauses = _judge_pauses(results["pauses"]) if "pauses" in results else []
    return pauses + (_judge_mirrored(results["mirrored"]) if "mirrored" in results else [])


def _judge_mirrored(runs: list[Run]) -> list[Target]:
    ours, theirs = having(runs, method="pageferry"), having(runs, method=f"QEMU, {mirrored.MODES[0]}")
    return [
        at_most(
            f"{what} of a migration with disks, of QEMU's",
            median_of(ours, key) / median_of(theirs, key),
            MAX_MIRRORED,
            "x",
            2,
        )
        for what, key, _, _ in MIRRORED[:2]
    ]


def _judge_pauses(measured: list[Run]) -> list[Target]:
    """Return a target for each method and amount of dirty pages."""
    runs = _with_ratios(measured)
    kinds = dict.fromkeys((run["method"], run["dirty"]) for run in runs if run["method"] != NO_DISK)
    return [
        at_most(
            f"pause with {method}, {amount} dirty, relative to the pause without a disk",
            median_of(having(runs, method=method, dirty=amount), "ratio"),
            MAX_RATIO,
            "",
            2,
        )
        for method, amount in kinds
    ]


def _with_ratios(runs: list[Run]) -> list[Run]:
    """Return the runs with their pauses relative to the median pause without a writable disk."""
    base = median_of(having(runs, method=NO_DISK), "pause-ms")
    return [run | {"ratio": run["pause-ms"] / base} for run in runs]
