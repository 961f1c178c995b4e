"""Size of pages that are sent again, whole or as deltas: `make bench-deltas` or `python -m benchmarks.deltas`.

The benchmark compares the pages that a round would send again with their contents in the previous round. The pages are
those of programs with different write patterns and of the built-in workload. `--quick` measures small workloads once.
docs/decisions/0011-pages-are-sent-again-whole.md discusses the results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.deltas.programs import PROGRAMS
from benchmarks.harness import examples, machine
from benchmarks.harness.bench import Bench, Results, Setting
from benchmarks.harness.tables import Column, Run, table
from benchmarks.migrate.ledger import Ledger
from pageferry._engine import SMALL_PAGE

ROUND = 0.5
"""Seconds between two rounds."""
CODECS = ("zstd", "lz4")
MAX_QUICK = 512
"""Maximum number of pages that are compared with --quick: the debug build of a codec is slow."""
LEDGER = {"rate": 20 << 20, "compressible": 0.5}
COLUMNS: tuple[Column, ...] = (
    ("memory MiB", "memory", 0, 1 << 20),
    ("sent again MiB", "again", 1, 1 << 20),
    ("whole, compressed MiB", "whole", 2, 1 << 20),
    ("deltas, compressed MiB", "delta", 2, 1 << 20),
    ("saved %", "saved-percent", 0, 1),
    ("whole MiB/s", "whole-mib-s", 0, 1),
    ("deltas MiB/s", "delta-mib-s", 0, 1),
)

Pages = dict[int, bytes]
"""Contents of pages by address."""


def measure(setting: Setting) -> list[Run]:
    """Measure each program with each codec."""
    runs = []
    for _ in range(setting.repetitions):
        for name in (*PROGRAMS, "built-in workload"):
            with _running(name) as pid:
                early, late = _round(pid), _round(pid)
            changed = sorted(address for address in early.keys() & late.keys() if early[address] != late[address])
            compared = changed[:: len(changed) // MAX_QUICK + 1] if setting.quick else changed
            for codec in setting.chosen(CODECS):
                found = _compare([early[at] for at in compared], [late[at] for at in compared], codec, setting)
                runs.append({"program": name, "codec": codec, "memory": len(late) * SMALL_PAGE} | found)
    return runs


def _round(pid: int) -> Pages:
    """Wait for the length of a round, stop a process, and return the contents of its writable memory."""
    time.sleep(ROUND)
    os.kill(pid, signal.SIGSTOP)
    try:
        return dict(_pages(pid))
    finally:
        os.kill(pid, signal.SIGCONT)


def _pages(pid: int) -> Iterator[tuple[int, bytes]]:
    zeros = bytes(SMALL_PAGE)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, permissions, *rest = line.split(maxsplit=5)
            if not permissions.startswith("rw") or rest[-1].startswith(("[v", "[stack")):
                continue
            start, end = (int(part, 16) for part in span.split("-"))
            memory.seek(start)
            try:
                data = memory.read(end - start)
            except OSError:  # the kernel does not permit reads of this mapping
                continue
            for at in range(0, len(data), SMALL_PAGE):
                if (page := data[at : at + SMALL_PAGE]) != zeros:
                    yield start + at, page


@contextmanager
def _running(name: str) -> Iterator[int]:
    if name not in PROGRAMS:
        with Ledger("resent", 64 << 20, LEDGER) as ledger:
            yield ledger.pid
        return
    words = [sys.executable, "-m", "benchmarks.deltas.programs", name]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=machine.ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def _compare(before: list[bytes], after: list[bytes], codec: str, setting: Setting) -> Run:
    files = setting.folder / "before", setting.folder / "after"
    for file, pages in zip(files, (before, after), strict=True):
        file.write_bytes(b"".join(pages))
    whole, delta, whole_speed, delta_speed = examples.delta(*files, codec, setting.quick)
    return {
        "again": len(after) * SMALL_PAGE,
        "whole": whole,
        "delta": delta,
        "saved-percent": (1 - delta / whole) * 100,
        "whole-mib-s": whole_speed,
        "delta-mib-s": delta_speed,
    }


def render(results: Results) -> list[str]:
    """Return a heading and a table."""
    return ["### Pages that are sent again", table(results["deltas"], ("program", "codec"), COLUMNS)]


BENCH = Bench(name="deltas", questions={"deltas": measure}, judge=lambda _: [], tables=render)

if __name__ == "__main__":
    machine.require("bench-deltas", "cargo")
    sys.exit(BENCH.main())
