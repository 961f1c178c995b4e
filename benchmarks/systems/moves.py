"""Migration: populated page tables (S1, S5), huge pages (S6, S7), and the cost of write traces (S2)."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Setting
from benchmarks.migrate import populate, side_by_side, stalls
from benchmarks.migrate.guest import BUSY, Line, Place
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import PageferryLine
from benchmarks.peers.qemu import QemuLine
from benchmarks.systems.row import Row, Switches
from pageferry._engine import LARGE_PAGE, Space
from pageferry.memory.view import Memory
from pageferry.workloads.arena.control_socket.client import RemoteArena
from pageferry.workloads.open import open_workload

FULL, SMALL = 512 << 20, 64 << 20
WRITER = {"working_set": 0.1, "zero_fraction": 0.1, "rate": 40 << 20}
"""Options of a workload that writes to the first tenth of its memory, in order."""
SCATTERED = WRITER | {"scatter": True}
QUIET = {"working_set": 0.01, "zero_fraction": 0.5, "rate": 1 << 20}
"""Options of a workload half of whose pages are zero pages. Few of its pages are sent again."""
NO_MOUNTS = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
"""Command prefix that drops CAP_SYS_ADMIN. Without this capability, a receiver cannot mount a tmpfs with huge pages,
and has to create huge pages itself."""


def arena(setting: Setting, switches: Switches) -> list[Row]:
    """Migrate the built-in workload with and without populated page tables (S1, S5)."""
    size = SMALL if setting.quick else FULL
    what = f"arena of {size >> 20} MiB, a tenth of it written, "
    with Ballast(size * 3 // 2) as ballast, Ledger("scattered", size, SCATTERED) as ledger:
        none, hot = (_faults(ledger, ballast, choice) for choice in ("none", switches.choose("S1", "hot", "none")))
    with Ballast(size * 3 // 2) as ballast, Ledger("gathered", size, WRITER) as ledger:
        few, every = (_mapped(ledger, ballast, choice) for choice in ("none", switches.choose("S5", "all", "none")))
    units = size // LARGE_PAGE
    return [
        Row("S1", what + "scattered", "page faults in the first second", none, hot, "at most 5", hot <= 5),
        Row("S5", what + "contiguous", "huge pages mapped when it resumes", few, every, f"all {units}", every >= units),
    ]


def guest(setting: Setting, switches: Switches) -> list[Row]:
    """Migrate a guest with and without populated page tables (S1), and by QEMU.

    In further migrations (S7), the receiver has to create the huge pages itself.
    """
    place = Place.of_checker(setting)
    load = "ferry.mib=48" if setting.quick else BUSY
    ours = PageferryLine("moved", place, machine.QEMU, load)
    theirs = QemuLine("moved by QEMU", place, machine.QEMU, load)
    with side_by_side.booted([(ours, []), (theirs, [])]), Ballast(place.reserve) as ballast:
        none, every = (
            _moved(ours, ballast, words=("--populate", choice))
            for choice in ("none", switches.choose("S1", "all", "none"))
        )
        kept, lost = (
            _moved(ours, ballast, words=("--large-pages", choice), through=NO_MOUNTS)
            for choice in (switches.choose("S7", "keep", "ignore"), "ignore")
        )
        peer = _moved(theirs, ballast)
    large = kept["large-source"]
    faults, there = every["faults-first-second"], kept["large-destination"]
    return [
        Row("S1", f"QEMU guest with {every['large-source']} huge pages, migrated",
            "page faults of its vCPUs in the first second, including QEMU's", none["faults-first-second"], faults,
            "at most 80 % of those without", faults <= 0.8 * none["faults-first-second"],
            _of(peer, "faults-first-second"), "QEMU, precopy"),
        Row("S7", "QEMU guest, migrated under writes", "huge pages at the destination", lost["large-destination"],
            there, f"the {large} of the source", there >= large > 0,
            _of(peer, "large-destination"), f"QEMU, precopy, of {peer['large-source']}"),
    ]  # fmt: skip


def large(setting: Setting, switches: Switches) -> list[Row]:
    """Measure the number of huge pages at a destination that has to create them itself (S6, S7)."""
    size = SMALL if setting.quick else FULL
    rows = []
    for system, options, which in (
        ("S6", QUIET, "migrated, half of its pages zeros"),
        ("S7", SCATTERED, "migrated under writes"),
    ):
        with Ballast(size * 3 // 2) as ballast, Ledger("large", size, options) as ledger:
            lost = populate.move(ledger, ballast, "all", "ignore", NO_MOUNTS)
        with Ballast(size * 3 // 2) as ballast, Ledger("large", size, options) as ledger:
            kept = populate.move(ledger, ballast, "all", switches.choose(system, "keep", "ignore"), NO_MOUNTS)
        there = kept["large-destination"]
        rows.append(
            Row(system, f"arena of {size >> 20} MiB, {which}", "huge pages at the destination",
                lost["large-destination"], there, f"the {kept['large-source']} of the source",
                there >= kept["large-source"] > 0)
        )  # fmt: skip
    return rows


def traces(setting: Setting, switches: Switches) -> list[Row]:
    """Measure the effect of write traces on a writer (S2), compared with that of a pause during the copy."""
    size = SMALL if setting.quick else FULL
    with Ledger("traced", size, {"compressible": 0.0, "rate": 20 << 20}) as ledger:
        stopped, traced = asyncio.run(_stalls(ledger, "S2" in switches.off))
    return [
        Row(
            "S2",
            f"arena of {size >> 20} MiB, 20 MiB/s written",
            "longest write while it is copied, ms",
            stopped,
            traced,
            "at most a tenth of that without",
            traced <= stopped / 10,
        )
    ]


def _moved(line: Line, ballast: Ballast, **options: Any) -> dict[str, Any]:
    """Migrate a guest, pause it afterwards, and return the figures."""
    ballast.hold()
    run = line.move(ballast, **options)
    line.rest()
    return run


def _of(peer: dict[str, Any], key: str) -> float | None:
    """Return a figure of QEMU's own migration; None if QEMU has lost its guest."""
    return float(peer[key]) if peer["alive"] else None


def _faults(ledger: Ledger, ballast: Ballast, choice: str) -> float:
    """Return the number of page faults in the first second after a migration. `choice`: value of `--populate`."""
    return float(populate.move(ledger, ballast, choice, "keep")["faults-first-second"])


def _mapped(ledger: Ledger, ballast: Ballast, choice: str) -> float:
    """Return the number of huge pages that the writer has mapped after a migration with this `--populate`."""
    populate.move(ledger, ballast, choice, "keep")
    workload = asyncio.run(open_workload(ledger.name))
    assert isinstance(workload, RemoteArena)
    try:
        segments = [segment for region in workload.regions for segment in region.segments]
        runs = [run for one in segments for run in Space(one.pid).large_mapped(one.address, one.length)]
    finally:
        workload.close()
    return sum(end - start for start, end in runs) / LARGE_PAGE


async def _stalls(ledger: Ledger, off: bool) -> tuple[float, float]:
    """Return the longest write, milliseconds, of a writer paused during the copy and of a traced writer."""
    workload = await open_workload(ledger.name)
    assert isinstance(workload, RemoteArena)
    try:
        memory = Memory(workload)
        stopped = (await stalls.stopped(workload, memory))["longest-us"]
        await workload.report()
        run = await (stalls.stopped(workload, memory) if off else stalls.traced(workload, memory, 256))
    finally:
        workload.close()
    return stopped / 1e3, run["longest-us"] / 1e3
