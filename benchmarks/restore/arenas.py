"""Opening of an arena of 4 GiB from an image, and the cost of a single fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import examples, machine
from benchmarks.harness.bench import Setting
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import expect, pageferry, reap

FULL, SMALL = 4 << 30, 64 << 20
CONTENTS = {"compressible": 0.5, "zero_fraction": 0.1, "rate": 1 << 20}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure lazy and eager opening of an arena."""
    image = setting.folder / "arena.image"
    size = SMALL if setting.quick else FULL
    with Ledger("opened", size, CONTENTS) as ledger:
        process = pageferry("checkpoint", ledger.name, str(image), "--output", "json")
        expect(process, "checkpoint")
        reap(process)
    modes = ("lazy", "eager") * setting.repetitions
    runs = [{"GiB": size / (1 << 30), "method": mode} | opened(image, mode) for mode in modes]
    image.unlink()
    return runs


def opened(image: Path, mode: str) -> dict[str, Any]:
    """Run a program that opens an arena, and return its output. `mode`: see `opener`."""
    words = [sys.executable, "-m", "benchmarks.restore.opener", str(image), mode]
    done = subprocess.run(words, cwd=machine.ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def demanded(image: Path) -> dict[str, Any]:
    """Return the cost of random accesses to an arena that is opened without read-ahead."""
    found = opened(image, "demand")
    return {key: found[key] for key in ("access-us", "read-kib")}


def measure_fault_threads(setting: Setting) -> list[dict[str, Any]]:
    """Measure the pager with 1, 4, 16 and 64 faulting threads; the example program repeats the measurement itself."""
    return examples.fault_threads(setting.quick)


def measure_faults(setting: Setting) -> list[dict[str, Any]]:
    """Measure the bare loop and the pager; the example program repeats the measurement itself."""
    return examples.fault_loop(setting.quick)
