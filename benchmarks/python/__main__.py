"""Benchmark of arrays in Python programs: `make bench-python`, or `python -m benchmarks.python [--quick]`.

The benchmark saves an array by `pageferry.dump` and by each installed peer, and loads it in new processes with a cold
page cache. It measures the time to the first element, random reads, and a full first pass. It measures a data frame
with strings in the same way, the memory of processes that load one array, and the longest gap of the heartbeat of an
event loop during a checkpoint and a load. Files are in the directory `--folder`; name a directory on a disk for
meaningful results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.bench import Bench, Results, Setting
from benchmarks.harness.tables import Column, Target, at_most, table
from benchmarks.python import frames, heartbeat, workers
from benchmarks.python.formats import FORMATS, installed

FULL, SMALL = 2 << 30, 16 << 20
"""Size of an array, bytes."""
CONTENTS = ("random", "half zero")
COLUMNS: tuple[Column, ...] = (
    ("save ms", "save-ms", 0, 1),
    ("file MiB", "file", 0, 1 << 20),
    ("first element ms", "first-ms", 1, 1),
    ("random read us", "random-us", 1, 1),
    ("full pass ms", "pass-ms", 0, 1),
)
FRAME_COLUMNS: tuple[Column, ...] = (
    ("save ms", "save-ms", 0, 1),
    ("file MiB", "file", 0, 1 << 20),
    ("first row ms", "first-ms", 1, 1),
    ("full pass ms", "pass-ms", 0, 1),
)
HEARTBEAT_COLUMNS: tuple[Column, ...] = (
    ("duration ms", "duration-ms", 0, 1),
    ("longest gap ms", "gap-ms", 1, 1),
    ("idle loop ms", "idle-ms", 1, 1),
)


def contents(kind: str, size: int) -> Any:
    """Return an array of `size` bytes; with `half zero`, every second MiB is zeros."""
    array = np.random.default_rng(1).random(size // 8)
    if kind == "half zero":
        array.reshape(-1, 1 << 17)[::2] = 0
    return array


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Save and load arrays of each kind in each format."""
    runs = []
    for kind in setting.chosen(CONTENTS):
        array = contents(kind, SMALL if setting.quick else FULL)
        for _ in range(setting.repetitions):
            for name in installed():
                path = setting.folder / "array"
                began = time.perf_counter()
                FORMATS[name].save(array, str(path))
                run = {"contents": kind, "format": name, "save-ms": (time.perf_counter() - began) * 1e3}
                run["file"] = path.stat().st_size
                for access in ("random", "pass"):
                    run |= accessed(name, path, access)
                runs.append(run)
    return runs


def accessed(name: str, path: Path, access: str) -> dict[str, float]:
    """Load the array in a new process, with a cold page cache. Return the durations."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    command = [sys.executable, "-m", "benchmarks.python.reader", name, str(path), access]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### Arrays",
        table(results["arrays"], ("contents", "format"), COLUMNS),
        "### Data frame with strings",
        table(results["frames"], ("format",), FRAME_COLUMNS),
        "### Memory of processes that load one array",
        table(results["workers"], ("format", "workers"), (("memory MiB", "memory", 0, 1 << 20),)),
        "### Longest gap of a heartbeat of 1 ms in the event loop",
        table(results["heartbeat"], ("operation",), HEARTBEAT_COLUMNS),
    ]


def judge(results: Results) -> list[Target]:
    """Compare the times with those of the fastest peer."""
    targets = [
        at_most("time to the first element", _best(results, "pageferry", "random", "first-ms"), 5.0, "ms"),
        _ratio(results, "random", "pass-ms", 1.2),
        _ratio(results, "half zero", "pass-ms", 0.7),
        _ratio(results, "random", "random-us", 1.5),
    ]
    four = at_most("memory of 4 processes, relative to one", _shared(results), 1.1, "x", 2)
    return [*targets, _ratio(results, "random", "save-ms", 1.2), four, *_gaps(results)]


def _gaps(results: Results) -> list[Target]:
    """Compare the gaps of the heartbeat with those of an idle loop."""
    gaps: dict[str, list[float]] = {}
    for run in results["heartbeat"]:
        gaps.setdefault(run["operation"], []).append(run["excess-ms"])
    about = "gap of a heartbeat above that of an idle loop"
    return [at_most(f"{about}, {name}", max(found), 10.0, "ms") for name, found in gaps.items()]


def _shared(results: Results) -> float | None:
    """Return the memory of 4 processes that share an image, relative to the memory of one process."""
    found = {run["workers"]: run["memory"] for run in results["workers"] if run["format"] == "pageferry, shared"}
    return found[4] / found[1] if found.get(1) else None


def _ratio(results: Results, kind: str, figure: str, wanted: float) -> Target:
    peers = [_best(results, name, kind, figure) for name in FORMATS if name != "pageferry"]
    known = [time for time in peers if time is not None]
    ours = _best(results, "pageferry", kind, figure)
    found = ours / min(known) if known and ours is not None else None
    return at_most(f"{figure}, {kind}, relative to the fastest peer", found, wanted, "x", 2)


def _best(results: Results, name: str, kind: str, figure: str) -> float | None:
    times = [float(run[figure]) for run in results["arrays"] if (run["format"], run["contents"]) == (name, kind)]
    return min(times, default=None)


QUESTIONS = {"arrays": measure, "frames": frames.measure, "workers": workers.measure, "heartbeat": heartbeat.measure}
BENCH = Bench(name="python", questions=QUESTIONS, judge=judge, tables=render)

if __name__ == "__main__":
    sys.exit(BENCH.main())
