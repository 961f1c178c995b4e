"""Page fault handlers of microVMs: `make bench-uffd`, or `python -m benchmarks.uffd [--quick]`.

A program maps memory as Firecracker does, and sends its userfaultfd to a handler: to `pageferry serve`, which reads a
compressed image, or to a plain handler, which reads an uncompressed memory file in the page cache. The plain handler
installs one page per fault in one thread. A second mode of it, the bare loop, installs everything at once.

Writes raw data and tables to benchmarks/results. The exit code is 0 unless an operation failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import pageferry
from benchmarks.harness import machine
from benchmarks.harness.ballast import Ballast
from benchmarks.harness.bench import Bench, Results, Setting
from benchmarks.harness.statistics import having, median_of
from benchmarks.harness.tables import Column, Run, Target, at_least, at_most, table
from pageferry.images.working_set import path_of
from tests.guest.compiler import compile_program
from tests.hugetlb import reserved
from tests.kernel import fake_firecracker
from tests.kernel.fake_firecracker import HUGE, PAGE
from tests.kernel.programs import Program

LENGTH, QUICK_LENGTH = 1 << 30, 64 << 20
"""Size of the memory, bytes."""
ACCESSES = 4000
"""Number of accesses whose times are measured."""
WORKING_SET = 1 / 16
"""Fraction of the memory that is accessed again after the first restore."""
WINDOW = 64 << 10
"""Length of the parts of the working set, bytes."""
EAGER, BARE = "pageferry, from a compressed image", "bare loop of UFFDIO_COPY"
SIZES = {"4 KiB": PAGE, "2 MiB": HUGE}
SWEEPS: tuple[Column, ...] = (("whole memory, ms", "sweep-ms", 0, 1), ("working set, ms", "set-ms", 1, 1))
TIMES: tuple[Column, ...] = (("p50 us", "p50-us", 1, 1), ("p99 us", "p99-us", 1, 1))
POPULATED: tuple[Column, ...] = (("MiB/s", "mib-s", 0, 1),)


class Scene:
    """Memory file, its image, and the plain handler."""

    def __init__(self, folder: Path, length: int) -> None:
        self.length = length
        self.folder = folder
        self.memory, self.image = folder / "memory", folder / "image"
        if not self.image.exists():
            self._write()
        self.plain = compile_program(Path(__file__).with_name("plain.rs"), folder / "plain")

    def _write(self) -> None:
        """Write memory of which half of every page is incompressible."""
        generator = np.random.default_rng(1)
        with open(self.memory, "wb") as file:
            for _ in range(0, self.length, 32 << 20):
                pages = np.zeros((32 << 20) // PAGE * PAGE, dtype="u1").reshape(-1, PAGE)
                pages[:, :2048] = generator.integers(0, 256, (len(pages), 2048), dtype="u1")
                file.write(pages.tobytes())
        (self.folder / "state").write_bytes(b"state")
        pageferry.import_image(self.image, firecracker=self.memory, vmstate=self.folder / "state")

    @contextmanager
    def served(self, *options: str) -> Iterator[Program]:
        """Serve the image."""
        words = ("-m", "pageferry", "serve", str(self.image), "--firecracker", str(self._socket()), *options)
        with Program(*words, "--output", "json", stderr=subprocess.DEVNULL) as program:
            assert program.json()["type"] == "serving"
            yield program

    @contextmanager
    def handler(self, *options: str) -> Iterator[Program]:
        """Serve the memory file by the plain handler."""
        with Program("-c", _EXEC, str(self.plain), str(self._socket()), str(self.memory), *options) as program:
            assert program.line() == "listening"
            yield program

    @contextmanager
    def microvm(self, page_size: int) -> Iterator[Program]:
        """Start a microVM whose memory is not loaded. Its memory is warm."""
        with Ballast(self.length) as ballast:
            ballast.hold()
        settings = fake_firecracker.settings(str(self._path), [self.length // 4 * 3, self.length // 4], page_size)
        with Program(fake_firecracker.__file__, settings) as program:
            assert program.json() == {"mapped": True}
            yield program

    @property
    def _path(self) -> Path:
        return self.folder / "sock"

    def _socket(self) -> Path:
        self._path.unlink(missing_ok=True)
        return self._path


_EXEC = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"


def _ask(program: Program, what: str, **arguments: Any) -> Any:
    program.say(json.dumps({"what": what, **arguments}))
    return program.json()


def _scenes(setting: Setting) -> Iterator[tuple[Scene, str, int]]:
    """Yield the scene with each page size for which the machine has memory."""
    scene = Scene(setting.folder, QUICK_LENGTH if setting.quick else LENGTH)
    for name, size in SIZES.items():
        if size == PAGE or os.geteuid() == 0:
            yield scene, name, size


def measure_sweeps(setting: Setting) -> list[Run]:
    """Measure the first access to all memory, and to a working set that an earlier microVM has accessed."""
    runs = []
    for scene, name, size in _scenes(setting):
        count = int(scene.length * WORKING_SET) // WINDOW
        windows = np.random.default_rng(3).permutation(scene.length // WINDOW)[:count]
        pages = [int(window) * WINDOW + at for window in windows for at in range(0, WINDOW, PAGE)]
        for _ in range(setting.repetitions):
            for method, options in (("pageferry", ()), ("pageferry, on demand only", ("--no-prefetch",))):
                run = _sweep(scene, size, options, pages)
                runs.append({"pages": name, "method": method, **run})
            runs.append({"pages": name, "method": "plain handler", **_sweep(scene, size, None, pages)})
    return runs


def _sweep(scene: Scene, size: int, options: tuple[str, ...] | None, pages: list[int]) -> Run:
    def serving(*more: str) -> Any:
        return scene.handler("demand", str(size)) if options is None else scene.served(*more)

    path_of(scene.image).unlink(missing_ok=True)
    with _pool(scene, size):
        with serving(*(options or ())), scene.microvm(size) as microvm:
            sweep = _ask(microvm, "stream", chunk=1 << 20)["seconds"]
        path_of(scene.image).unlink(missing_ok=True)
        if options is not None:  # record the working set
            with serving("--no-prefetch") as pager, scene.microvm(size) as microvm:
                _ask(microvm, "access", offsets=pages)
                microvm.kill()
                pager.wait()
        with serving(*(options or ())), scene.microvm(size) as microvm:
            accessed = sum(_ask(microvm, "access", offsets=pages)["us"])
    path_of(scene.image).unlink(missing_ok=True)
    return {"sweep-ms": sweep * 1e3, "set-ms": accessed / 1e3}


def _pool(scene: Scene, size: int) -> Any:
    return reserved(scene.length // HUGE) if size == HUGE else nullcontext()


def measure_times(setting: Setting) -> list[Run]:
    """Measure single accesses, in sequence and at random."""
    runs = []
    for scene, name, size in _scenes(setting):
        count = min(ACCESSES, scene.length // size // 2)
        orders = {
            "sequential": [at * size for at in range(count)],
            "random": [int(at) * size for at in np.random.default_rng(4).permutation(scene.length // size)[:count]],
        }
        for _ in range(setting.repetitions):
            for order, offsets in orders.items():
                for method in ("pageferry", "plain handler"):
                    with ExitStack() as stack:
                        stack.enter_context(_pool(scene, size))
                        demand = ("demand", str(size))
                        ours = method == "pageferry"
                        stack.enter_context(scene.served("--no-prefetch") if ours else scene.handler(*demand))
                        microvm = stack.enter_context(scene.microvm(size))
                        times = _ask(microvm, "access", offsets=offsets)["us"]
                    p50, p99 = np.percentile(times, [50, 99]).tolist()
                    runs.append({"pages": name, "order": order, "method": method, "p50-us": p50, "p99-us": p99})
    path_of(setting.folder / "image").unlink(missing_ok=True)
    return runs


def measure_populate(setting: Setting) -> list[Run]:
    """Measure the time until all memory is loaded, with nothing accessed."""
    runs = []
    threads = os.cpu_count() or 1
    for scene, name, size in _scenes(setting):
        for _ in range(setting.repetitions):
            with _pool(scene, size), scene.served("--eager") as pager, scene.microvm(size):
                assert pager.json()["type"] == "microvm-connected"
                ours = pager.json()["duration-ms"] / 1e3
            with _pool(scene, size), scene.handler("all", str(threads)) as handler, scene.microvm(size):
                bare = int(handler.line()) / 1e6
            for method, seconds in ((EAGER, ours), (BARE, bare)):
                runs.append({"pages": name, "method": method, "mib-s": (scene.length >> 20) / seconds})
    return runs


def render(results: Results) -> list[str]:
    """Return headings and tables."""
    return [
        "### First access of a microVM to its memory",
        table(results["sweeps"], ("pages", "method"), SWEEPS),
        "### One access",
        table(results["times"], ("pages", "order", "method"), TIMES),
        "### All memory at once",
        table(results["populate"], ("pages", "method"), POPULATED),
    ]


def judge(results: Results) -> list[Target]:
    """Return all targets, in reading order."""
    targets = []
    for name in dict.fromkeys(run["pages"] for run in results["sweeps"]):
        runs = having(results["sweeps"], pages=name)
        ours, plain = having(runs, method="pageferry"), having(runs, method="plain handler")
        for key, what, wanted in (("sweep-ms", "first sweep", 0.5), ("set-ms", "replay of the working set", 0.2)):
            ratio = median_of(ours, key) / median_of(plain, key)
            targets.append(at_most(f"{what}, {name}, relative to the plain handler", ratio, wanted, "x", 2))
        for order, wanted in (("sequential", 1.1), ("random", 2.0)):
            runs = having(results["times"], pages=name, order=order)
            ours, plain = having(runs, method="pageferry"), having(runs, method="plain handler")
            ratio = median_of(ours, "p50-us") / median_of(plain, "p50-us")
            targets.append(at_most(f"median access, {order}, {name}, relative to it", ratio, wanted, "x", 2))
        runs = having(results["populate"], pages=name)
        rates = [median_of(having(runs, method=method), "mib-s") for method in (EAGER, BARE)]
        targets.append(
            at_least(f"all memory at once, {name}, relative to a bare loop", rates[0] / rates[1], 0.9, "x", 2)
        )
    return targets


BENCH = Bench(
    name="uffd",
    questions={"sweeps": measure_sweeps, "times": measure_times, "populate": measure_populate},
    judge=judge,
    tables=render,
)

if __name__ == "__main__":
    machine.require("bench-uffd", "rustc")
    sys.exit(BENCH.main())
