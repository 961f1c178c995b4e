"""Tables and targets of the post-copy benchmark."""

from __future__ import annotations

from benchmarks.harness.bench import Results
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Column, Run, Target, at_most, rows, table
from benchmarks.postcopy import accesses, guests, ledgers

WAITS: tuple[Column, ...] = (("access waits, median us", "p50-us", 0, 1), ("99 % us", "p99-us", 0, 1))
MOVED: tuple[Column, ...] = (
    ("total ms", "total-ms", 0, 1),
    ("downtime ms", "downtime-ms", 0, 1),
    ("writes during migration, % of usual", "work-percent", 0, 1),
    ("rounds", "rounds", 0, 1),
    ("pages requested", "requests", 0, 1),
    *WAITS,
    ("sent MiB", "transferred", 0, 1 << 20),
)
GUESTS: tuple[Column, ...] = (
    ("STOP to RESUME ms", "stop-to-resume-ms", 0, 1),
    ("guest silent ms", "silence-ms", 0, 1),
    ("vCPU blocked ms", "blocked-ms", 0, 1),
    *MOVED,
)
ACCESSES: tuple[Column, ...] = (
    ("accesses that waited", "accesses", 0, 1),
    ("median us", "p50-us", 0, 1),
    ("90 % us", "p90-us", 0, 1),
    ("99 % us", "p99-us", 0, 1),
    ("longest us", "longest-us", 0, 1),
)
DOWNTIME = 50.0
"""Maximum downtime of a post-copy migration, milliseconds."""
SLICES = 10


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### A guest that writes faster than the link",
        table(results["guests"], ("line", "mode"), GUESTS),
        f"Pages written per second, by tenths of the migration (usual: {guests.RATE:,}):",
        _over_time(results["guests"], ("line", "mode")),
        "### The built-in workload, which writes faster than the link",
        table(results["ledger"], ("mode",), MOVED),
        f"Pages written per second, by tenths of the migration (usual: {ledgers.WRITER['rate'] // 4096:,}):",
        _over_time(results["ledger"], ("mode",)),
        "### Latency of an access to a page at the source",
        table(results["accesses"], ("method",), ACCESSES),
    ]


def judge(results: Results) -> list[Target]:
    """Return all targets, in reading order."""
    guest = having(results["guests"], line="pageferry")
    theirs = next(run for run in results["guests"] if "ended" in run)
    ours = next(run for run in results["ledger"] if run["mode"] == "precopy")
    return [
        Target(
            "QEMU's pre-copy of a guest that writes faster than the link",
            f"does not converge within {guests.TIMEOUT:g} x of sending its memory once",
            f"ended after {theirs['rounds']} rounds"
            if theirs["ended"]
            else f"{theirs['rounds']} rounds, not converged",
            not theirs["ended"],
        ),
        _hybrid("hybrid, the same guest", guest, guests.once(results["guests"])),
        _hybrid("hybrid, the built-in workload", results["ledger"], ledgers.once(results["ledger"])),
        Target(
            "pre-copy, the built-in workload",
            "fails by itself",
            "ended" if ours["ended"] else f"failed after {ours['rounds']} rounds",
            not ours["ended"],
        ),
        at_most(
            "downtime in post-copy, guest", median_of(having(guest, mode="postcopy"), "downtime-ms"), DOWNTIME, "ms"
        ),
        at_most(
            "downtime in post-copy, built-in workload",
            median_of(having(results["ledger"], mode="postcopy"), "downtime-ms"),
            DOWNTIME,
            "ms",
        ),
        *_accesses(results["accesses"]),
    ]


def _hybrid(what: str, runs: list[Run], once: float) -> Target:
    total = median_of(having(runs, mode="hybrid"), "total-ms")
    return at_most(
        f"{what}: total time, relative to sending its memory once ({once:.1f} s)", total / once / 1e3, 2, "x", 2
    )


def _accesses(runs: list[Run]) -> list[Target]:
    """Return the targets for the access latency during each kind of push, relative to the latency without a push."""
    idle, *pushed = accesses.METHODS
    alone = median_of(having(runs, method=idle), "p50-us")
    found = {method: median_of(having(runs, method=method), "p99-us") for method in pushed}
    return [
        at_most(f"99 % of access waits, {method}, relative to the idle median ({alone:.0f} us)", worst / alone, 5, "x")
        for method, worst in found.items()
    ]


def _over_time(runs: list[Run], by: tuple[str, ...]) -> str:
    """Return a table of the first repetition of each group, with the rates of a migration reduced to ten columns."""
    first: dict[tuple[str, ...], Run] = {}
    for run in runs:
        if "writes-per-second" in run:
            first.setdefault(tuple(str(run[key]) for key in by), run)
    lines = [(*name, *(f"{rate:,.0f}" for rate in _tenths(run["writes-per-second"]))) for name, run in first.items()]
    return rows((*by, *(f"{number}/{SLICES}" for number in range(1, SLICES + 1))), lines)


def _tenths(rates: list[float]) -> list[float]:
    return [rates[min(number * len(rates) // SLICES, len(rates) - 1)] for number in range(SLICES)]
