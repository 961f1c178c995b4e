"""Opening of an arena from a store: lazily, completely, a second time, and after a download."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.bench import Setting
from benchmarks.migrate.ledger import Ledger
from benchmarks.migrate.pageferry_line import expect, pageferry, reap
from benchmarks.restore.arenas import CONTENTS, FULL, SMALL
from benchmarks.store.place import Place, store

NAME = "arena"


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure each method in turn."""
    image = setting.folder / "arena.image"
    size = SMALL if setting.quick else FULL
    with Ledger("stored", size, CONTENTS) as ledger:
        process = pageferry("checkpoint", ledger.name, str(image), "--output", "json")
        expect(process, "checkpoint")
        reap(process)
    runs = []
    with store(setting) as place:
        place.push(image, NAME)
        place.upload(image, "image")
        stored = image.stat().st_blocks * 512
        for _ in range(setting.repetitions):
            rate = place.link_rate(1 if setting.quick else 3)
            for method, run in _methods(place, image).items():
                mbps = stored * 8 / 1e3 / run["complete-ms"]
                runs.append({"GiB": size / (1 << 30), "method": method, "iperf3-mbps": rate, "mbps": mbps} | run)
    image.unlink()
    return runs


def _methods(place: Place, image: Path) -> dict[str, dict[str, Any]]:
    url, runs = f"{place.url}/{NAME}", {}
    runs["local"] = opened(place, str(image), "lazy")
    runs["local, eager"] = opened(place, str(image), "eager")
    place.clear()
    runs["store, on demand"] = opened(place, url, "demand")
    place.clear()
    runs["store"] = opened(place, url, "lazy")
    place.clear()
    runs["store, eager"] = opened(place, url, "eager")
    time.sleep(1)  # the provider records that the image is complete
    runs["store, second time"] = opened(place, url, "lazy")
    runs["store, second time, eager"] = opened(place, url, "eager")
    place.clear()
    copy = place.folder / "copy"
    seconds = place.download("image", copy)
    run = opened(place, str(copy), "lazy")
    copy.unlink()
    added = {key: run[key] + seconds * 1e3 for key in ("open-ms", "complete-ms")}
    runs["download, then local"] = run | added
    return runs


def opened(place: Place, source: str, mode: str) -> dict[str, Any]:
    """Run a program that opens an arena, on the client, and return its output. `mode`: see
    `benchmarks.restore.opener`."""
    words = [*place.client.within, sys.executable, "-m", "benchmarks.restore.opener", source, mode]
    done = subprocess.run(
        words, cwd=machine.ROOT, env=dict(place.environment), check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
