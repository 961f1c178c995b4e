"""Preparation of the destination before the workload resumes: page tables (S1, S5) and huge pages (S6), on and off."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate import side_by_side
from benchmarks.migrate.guest import BUSY, MEMORY, Place
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import PageferryLine, expect, pageferry
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.open import open_workload

POPULATE = ("all", "hot", "none")
LARGE_PAGES = ("keep", "ignore")
FULL, SMALL = 512 << 20, 64 << 20
BALLAST = 1152 << 20
SLOW = 14
"""Binary logarithm of the minimum duration of a slow write, nanoseconds (16 us). On an idle machine, slow writes are
those that cause a page fault."""
WRITER = {"working_set": 0.1, "scatter": True, "zero_fraction": 0.1, "rate": 400 << 20}
"""Options of a workload that writes to a tenth of all pages at random.

The migration converges, and every huge page is used.
"""


def choices(repetitions: int) -> list[tuple[str, str]]:
    """Return all combinations of `--populate` and `--large-pages`, each `repetitions` times.

    Combinations with `--large-pages ignore` are last: the workload may lose its huge pages for all later migrations.
    """
    return [(populate, large) for large in LARGE_PAGES for populate in POPULATE * repetitions]


def measure_guest(setting: Setting) -> list[dict[str, Any]]:
    """Migrate a guest with each combination of `--populate` and `--large-pages`."""
    runs = []
    place = replace(Place.of_checker(setting), memory=MEMORY)
    line = PageferryLine("populate", place, machine.QEMU, BUSY)
    with Ballast(side_by_side.BALLAST) as ballast, side_by_side.booted([(line, [])]):
        ballast.hold()
        for populate, large in choices(setting.repetitions):
            words = ("--populate", populate, "--large-pages", large)
            runs.append({"populate": populate, "large-pages-option": large} | line.move(ballast, words=words))
            line.rest()
    return runs


def measure_ledger(setting: Setting) -> list[dict[str, Any]]:
    """Migrate the built-in workload with each combination of `--populate` and `--large-pages`."""
    with Ballast(BALLAST) as ballast, Ledger("ledger", SMALL if setting.quick else FULL, WRITER) as ledger:
        return [move(ledger, ballast, *choice) for choice in choices(setting.repetitions)]


def move(ledger: Ledger, ballast: Ballast, populate: str, large: str, through: tuple[str, ...] = ()) -> dict[str, Any]:
    """Migrate the built-in workload once, and return the figures. `through`: command prefix of the receiver."""
    ledger.prepare(through)
    ballast.hold()
    ballast.release()
    options = ("--populate", populate, "--large-pages", large)
    sender = pageferry("migrate", ledger.name, ledger.address, "--output", "json", *options)
    told = expect(sender, "migration")
    ledger.moved()
    if sender.wait():
        raise RuntimeError(f"cannot migrate {ledger.name}: pageferry exited with code {sender.returncode}")
    # The command has observed the first second by now; the histogram covers all writes since the resume.
    stalls: dict[str, Any] = asyncio.run(_report(ledger.name))
    return {
        "populate": populate,
        "large-pages-option": large,
        "faults-first-second": told["faults-after-resume"]["minor"] + told["faults-after-resume"]["major"],
        "longest-write-us": stalls["longest-stall-ns"] / 1e3,
        "slow-writes": sum(stalls["stalls"][SLOW:]),
        "total-ms": told["total-time"],
        "downtime-ms": told["downtime"],
        "downtime-parts": told["downtime-parts"],
        "populated": told["populated"],
        "large-source": told["large-pages"]["source"],
        "large-destination": told["large-pages"]["destination"],
    }


async def _report(name: str) -> dict[str, object]:
    workload = await open_workload(name)
    assert isinstance(workload, RemoteArena)
    try:
        return await workload.report()
    finally:
        workload.close()
