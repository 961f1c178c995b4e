"""Memory of several processes that load one array: `python -m benchmarks.python.workers FORMAT PATH` is one of them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

import pageferry
from benchmarks.harness.bench import Setting
from benchmarks.python.formats import FORMATS, Format

FULL, SMALL = 1 << 30, 16 << 20
"""Size of the array, bytes."""
COUNTS = (1, 4)
LOADED: dict[str, Format] = {
    "pageferry": FORMATS["pageferry"],
    "pageferry, shared": Format("pageferry", pageferry.dump, lambda path: pageferry.load(path, memory="shared")),
    "numpy": FORMATS["numpy"],
}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Load an array in one process and in 4, and return their memory."""
    array = np.random.default_rng(1).random((SMALL if setting.quick else FULL) // 8)
    runs = []
    for name, one in LOADED.items():
        path = setting.folder / "workers"
        one.save(array, str(path))
        runs += [{"format": name, "workers": count, "memory": memory(name, path, count)} for count in COUNTS]
    return runs


def memory(name: str, path: Path, count: int) -> int:
    """Return the total increase of the PSS of processes that have loaded the array, bytes."""
    with ExitStack() as stack:
        command = [sys.executable, "-m", "benchmarks.python.workers", name, str(path)]
        start = partial(subprocess.Popen[str], command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        workers = [stack.enter_context(start()) for _ in range(count)]
        before = sum(_ask(worker) for worker in workers)
        for worker in workers:
            _ask(worker)  # reads all
        after = sum(_ask(worker) for worker in workers)
        for worker in workers:
            _stream(worker.stdin).close()
    return after - before


def _ask(worker: subprocess.Popen[str]) -> int:
    _stream(worker.stdin).write("\n")
    _stream(worker.stdin).flush()
    return int(_stream(worker.stdout).readline())


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def pss() -> int:
    """Return the proportional set size (PSS) of this process, bytes."""
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def main(name: str, path: str) -> None:
    """Print the PSS for each line of standard input: before the load, after a read of the whole array, and again."""
    sys.stdin.readline()
    print(pss(), flush=True)
    sys.stdin.readline()
    array = LOADED[name].load(path)
    array.sum()
    print(pss(), flush=True)
    sys.stdin.readline()
    print(pss(), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
