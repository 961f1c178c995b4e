"""Analysis of huge pages: base pages in use (S3), and duplicate pages (S9)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from benchmarks.harness.bench import Setting
from benchmarks.large_pages.__main__ import Reader, reader
from benchmarks.large_pages.reader import truth
from benchmarks.sharing import __main__ as sharing
from benchmarks.systems.row import Row, Switches
from pageferry._engine import LARGE_PAGE
from pageferry.host import smaps
from pageferry.large_pages import Options, sample_async

WINDOW = 1.0
"""Length of a window, seconds."""


def activity(setting: Setting, switches: Switches) -> list[Row]:
    """Measure, by accessed bits and by sampling, the memory in use of a process with a known access pattern (S3)."""
    mebibytes = 28 if setting.quick else 224
    with reader("shared", mebibytes, "pattern") as one:
        used = sum(truth(unit) for unit in range(one.size // LARGE_PAGE)) * 4096 / (1 << 20)
        without = _referenced(one)
        found = without if "S3" in switches.off else asyncio.run(_sampled(one))
    return [
        Row(
            "S3",
            f"process that uses {used:.0f} of {mebibytes} MiB on huge pages",
            "MiB reported as in use",
            without,
            found,
            "correct within 5 %",
            abs(found - used) <= 0.05 * used,
        )
    ]


def sharable(setting: Setting, switches: Switches) -> list[Row]:
    """Measure two processes with duplicate pages (S9), with KSM on all memory and on pageferry's selection."""
    mebibytes = 32 if setting.quick else 192
    alone = sharing.measure("KSM alone", mebibytes)
    chosen = sharing.measure(switches.choose("S9", "pageferry, threshold 64", "KSM alone"), mebibytes)
    part = chosen["freed-mib"] / alone["freed-mib"]
    return [
        Row(
            "S9",
            f"2 processes of {mebibytes} MiB on huge pages; {part:.0%} of the memory that KSM alone frees",
            "huge pages split",
            alone["broken"],
            chosen["broken"],
            "at most a quarter of KSM's, for at least 80 % of what it frees",
            chosen["broken"] <= alone["broken"] / 4 and part >= 0.8,
            alone["broken"],
            "KSM alone",
        )
    ]


def _referenced(one: Reader) -> float:
    """Return the memory in use, MiB, by the accessed bits of the process's mappings (proc(5), clear_refs and smaps)."""
    Path(f"/proc/{one.pid}/clear_refs").write_text("1")
    time.sleep(WINDOW)
    areas = (area for area in smaps.smaps(one.pid) if area.mapping.address <= one.address < area.mapping.end)
    return sum(area.counts["Referenced"] for area in areas) / (1 << 20)


async def _sampled(one: Reader) -> float:
    with one.target() as target:
        result = await sample_async(target, Options(sample=1.0, budget=None, window=WINDOW, rounds=1))
    return sum(found.activity for found in result.samples) * 4096 / (1 << 20)
