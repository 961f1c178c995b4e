"""Cost of encryption: transfers and eager restores of one image, with a directory on tmpfs as the store.

`python -m benchmarks.store.encryption [MIB REPETITIONS]` prints the medians. Runs with and without encryption
alternate. The CPU time is that of all threads of this process, without the process that fetches blocks for a restore.
It is less affected by other processes than the time.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pageferry
from benchmarks.harness.bench import Setting

FULL, SMALL = 512, 16
"""Memory of the arena, MiB: at full size, and with `--quick`."""


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Measure each operation with and without encryption."""
    return runs(setting.folder / "encryption", SMALL if setting.quick else FULL, setting.repetitions)


def runs(folder: Path, mib: int, repetitions: int) -> list[dict[str, Any]]:
    """Measure in a new directory, which is removed. `mib`: memory of the arena, half of which is random."""
    folder.mkdir()
    earlier = os.environ.get("PAGEFERRY_CACHE_DIR")
    os.environ["PAGEFERRY_CACHE_DIR"] = str(folder / "cache")
    try:
        _save(folder / "image", mib)
        (folder / "key").write_bytes(os.urandom(32))
        (folder / "key").chmod(0o600)
        return [run for number in range(repetitions) for run in _repetition(folder, number)]
    finally:
        os.environ.pop("PAGEFERRY_CACHE_DIR")
        if earlier is not None:
            os.environ["PAGEFERRY_CACHE_DIR"] = earlier
        shutil.rmtree(folder)


def _save(image: Path, mib: int) -> None:
    arena = pageferry.Arena(mib << 20)
    words = np.frombuffer(memoryview(arena), "u8").reshape(-1, 512)
    words[:, :256] = np.random.default_rng(1).integers(0, 1 << 63, (len(words), 256), dtype="u8")
    pageferry.checkpoint(arena, image)


def _repetition(folder: Path, number: int) -> list[dict[str, Any]]:
    """Measure the operations. Each one begins without cached contents, and uploads everything again."""
    image, copy = folder / "image", folder / "copy"
    measured = []
    for encrypted in (False, True):
        key: dict[str, Any] = {"key": folder / "key"} if encrypted else {}
        store = folder / f"store-{encrypted}"
        url = f"file://{store}/{number}"
        operations: dict[str, Callable[[], object]] = {
            "push": lambda: pageferry.push_image(image, url, reupload=True, **key),  # noqa: B023
            "pull": lambda: pageferry.pull_image(url, copy, **key),  # noqa: B023
            "eager restore": lambda: pageferry.restore(url, eager=True, **key).load(),  # noqa: B023
        }
        for name, operation in operations.items():
            wall, cpu = time.perf_counter(), time.process_time()
            operation()
            times = {"s": time.perf_counter() - wall, "cpu-s": time.process_time() - cpu}
            measured.append({"method": f"{name}, encrypted" if encrypted else name} | times)
        copy.unlink()
        pageferry.clear_cache()
        shutil.rmtree(store)
    return measured


def summary(measured: list[dict[str, Any]]) -> list[str]:
    """Return a line per operation with the medians."""
    return [
        f"{name}: time {_median(measured, name, 's'):.3f} s, encrypted {cost(measured, name, 's') - 1:+.0%}; CPU time "
        f"{_median(measured, name, 'cpu-s'):.3f} s, encrypted {cost(measured, name, 'cpu-s') - 1:+.0%}"
        for name in ("push", "pull", "eager restore")
    ]


def cost(measured: list[dict[str, Any]], name: str, unit: str) -> float:
    """Return the median of an operation with encryption, as a multiple of that without."""
    return _median(measured, f"{name}, encrypted", unit) / _median(measured, name, unit)


def _median(measured: list[dict[str, Any]], name: str, unit: str) -> float:
    return statistics.median(float(run[unit]) for run in measured if run["method"] == name)


if __name__ == "__main__":
    size, count = map(int, sys.argv[1:]) if len(sys.argv) > 1 else (FULL, 7)
    with tempfile.TemporaryDirectory(prefix="pf-", dir="/dev/shm") as folder:
        print(*summary(runs(Path(folder, "encryption"), size, count)), sep="\n")
