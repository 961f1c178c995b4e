"""Tables and targets of the checkpoint benchmark."""

from __future__ import annotations

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Column, Target, at_least, at_most, table

PAUSE: tuple[Column, ...] = (("pause ms", "own-pause-ms", 1, 1), ("device state ms", "device-state-ms", 1, 1))
SAVED: tuple[Column, ...] = (
    ("total ms", "total-ms", 0, 1),
    ("slowdown %", "slowdown-percent", 1, 1),
    ("image MiB", "bytes", 0, 1 << 20),
    ("writes", "writes", 0, 1),
    ("mean write KiB", "mean-write", 0, 1 << 10),
)
TRAPS: tuple[Column, ...] = (("traps", "traps", 0, 1), ("mean trap us", "trap-us", 0, 1))
GUEST = (("STOP to RESUME ms", "pause-ms", 1, 1), *PAUSE, *SAVED, *TRAPS)
LEDGER = (*PAUSE, *SAVED, *TRAPS, ("longest write us", "longest-write-us", 0, 1))
CODECS = (
    ("saved MiB/s", "saved-mib-s", 0, 1),
    ("codec alone MiB/s", "codec-mib-s", 0, 1),
    ("ratio", "of-codec", 2, 1),
    ("compression", "compression", 2, 1),
)
BY_SIZE = (("pause ms per GiB", "pause-ms-per-gib", 2, 1), *PAUSE, ("protection before the pause ms", "arm-ms", 1, 1))
CHAIN = (("total ms", "total-ms", 0, 1), ("image MiB", "bytes", 1, 1 << 20), *PAUSE)


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### One guest of 1 GiB, all of it accessed",
        table(results["guests"], ("load", "line", "method"), GUEST),
        "### The built-in workload, 1 GiB",
        table(results["ledger"], ("load", "method"), LEDGER),
        "### Saved, and the codec alone",
        table(results["codecs"], ("codec",), CODECS),
        "### The pause of an arena",
        table(results["pause"], ("GiB",), BY_SIZE),
        "### A second checkpoint after few writes",
        table(results["increments"], ("checkpoint",), CHAIN),
    ]


def judge(results: Results) -> list[Target]:
    """Return all targets, in reading order."""
    lazy = having(results["guests"], load="20 MiB/s", line="pageferry", method="lazy")
    ledger = having(results["ledger"], load="20 MiB/s", method="lazy")
    first = having(results["increments"], checkpoint="first")
    second = having(results["increments"], checkpoint="second, with parent")
    return [
        at_most("pause of a 1 GiB guest, without device state", median_of(lazy, "beside-state-ms"), 5, "ms"),
        at_most("pause of an arena, per GiB", median_of(results["pause"], "pause-ms-per-gib"), 2, "ms", 2),
        at_most("slowdown of a guest that writes 20 MiB/s", median_of(lazy, "slowdown-percent"), 20, "%"),
        at_most("slowdown of the built-in workload at 20 MiB/s", median_of(ledger, "slowdown-percent"), 20, "%"),
        at_least("mean write, guest", median_of(lazy, "mean-write") / 1024, 256, "KiB", 0),
        at_least("mean write, built-in workload", median_of(ledger, "mean-write") / 1024, 256, "KiB", 0),
        Target(
            "writes, guest",
            f"fewer than one per page ({median_of(lazy, 'data-pages'):,.0f})",
            f"{median_of(lazy, 'writes'):,.0f}",
            median_of(lazy, "writes") < median_of(lazy, "data-pages"),
        ),
        Target(
            "second checkpoint of a chain",
            f"smaller than the first ({median_of(first, 'bytes') / 2**20:.0f} MiB)",
            f"{median_of(second, 'bytes') / 2**20:.1f} MiB",
            median_of(second, "bytes") < median_of(first, "bytes"),
        ),
    ]
