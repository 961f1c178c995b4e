"""Checkpoints of a clone of 1 GiB that writes to 5 % of its memory."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.clones.guests import WATCHED, image_of, start, stop
from benchmarks.harness.bench import Setting
from benchmarks.migrate.pageferry_line import PAGEFERRY, expect, pageferry, reap
from pageferry.host.registry import Folder, Registry
from pageferry.pager.base_records import clone_record
from pageferry.workloads.inventory import private_pages

RATE = 8192
"""Load of the guest: 8192 pages (32 MiB) written per second."""
MODES = ("lazy", "stop")


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Save a clone in each mode, while it runs and while its user has paused it."""
    image = setting.folder / "image"
    command, runs = image_of(setting, RATE, image), []
    for _ in range(setting.repetitions):
        clone = start(command, image, "shared", 1, "clone")
        try:
            time.sleep(WATCHED)
            name = clone["clones"][0]["name"]
            pauses = {mode: _save(name, image, mode)["downtime"] for mode in MODES}
            # The private memory of a paused clone is constant.
            subprocess.run([str(PAGEFERRY), "pause", name], check=True, capture_output=True)
            runs += [{"mode": mode, "downtime-ms": pauses[mode]} | _sizes(name, image, mode) for mode in MODES]
        finally:
            stop(clone)
    return runs


def _save(name: str, image: Path, mode: str) -> dict[str, Any]:
    target = image.with_name("clone")
    process = pageferry("checkpoint", name, str(target), "--mode", mode, "--output", "json")
    saved = expect(process, "checkpoint")
    reap(process)
    target.unlink()
    return saved


def _sizes(name: str, image: Path, mode: str) -> dict[str, Any]:
    record = clone_record(Folder(Registry(), name))
    assert record is not None
    private, saved = private_pages(record), _save(name, image, mode)["bytes-written"]
    return {"private": private, "saved": saved, "saved-of-private": saved / private}
