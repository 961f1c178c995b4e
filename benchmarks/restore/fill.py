"""Loading of a whole image from a disk: the pager, fio, and a bare loop."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import examples, machine
from benchmarks.harness.bench import Setting
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import expect, pageferry, reap
from benchmarks.peers import fio

FULL, SMALL = 8 << 30, 16 << 20
CONTENTS: dict[str, dict[str, Any]] = {
    "incompressible": {"rate": 1 << 20},
    "half compressible": {"rate": 1 << 20, "compressible": 0.5, "zero_fraction": 0.1},
}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Save an arena of each kind to a disk, and load its image repeatedly, each time after fio has read the file."""
    runs = []
    size = SMALL if setting.quick else FULL
    # The folder of the other measurements is on tmpfs.
    with tempfile.TemporaryDirectory(dir=machine.ROOT / ".cache") as folder:
        for contents, options in CONTENTS.items():
            image = Path(folder, "arena.image")
            _save(image, size, options)
            for _ in range(setting.repetitions):
                rate = fio.read_rate(image)
                run = examples.fill_speed(image, setting.quick)
                speeds = {
                    f"{way}-mib-s": run["stored-mib"] / run[f"{way}-ms"] * 1e3 for way in ("bare", "cold", "warm")
                }
                runs.append({"contents": contents, "fio-mib-s": rate} | run | speeds)
            image.unlink()
    return runs


def _save(image: Path, size: int, options: dict[str, Any]) -> None:
    with Ledger("filled", size, options) as ledger:
        process = pageferry("checkpoint", ledger.name, str(image), "--output", "json")
        expect(process, "checkpoint")
        reap(process)
