"""Benchmark of page sharing (S9): `make bench-sharing`, or `python -m benchmarks.sharing [--quick]`.

The benchmark compares KSM on all memory with KSM on the huge pages that pageferry selects, and measures the scan rate.
Each round starts new processes with the same contents for each line, in turn. The freed memory is the decrease of the
processes' PSS. The number of split huge pages is the decrease of their AnonHugePages. The CPU time is that of ksmd and
pageferry together.

The benchmark requires root, and a machine on which no other program uses KSM. It writes raw data and tables to
benchmarks/results.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.bench import Bench, Results, Setting
from benchmarks.harness.statistics import having, median_of, values
from benchmarks.harness.tables import Run, Target, at_least, at_most, table
from pageferry._engine import LARGE_PAGE, Advice, Mapping, SharingScan, Space
from pageferry.host.smaps import total
from pageferry.sharing import api, ksm, ranges
from pageferry.sharing.ranges import Range
from pageferry.workloads.arena.arena import memory_file
from pageferry.workloads.target import process_target

PROCESSES = 2
RICH, PER_RICH = 8, 300
"""Contents of the processes: one huge page in eight has 300 duplicate pages; the others have one or two."""


@contextmanager
def lookalikes(mib: int) -> Iterator[list[tuple[int, int]]]:
    """Start processes with `mib` MiB of memory each. Yield their pids and the addresses of their memory."""
    with ExitStack() as stack:
        found = []
        for seed in range(PROCESSES):
            words = [sys.executable, "-m", "benchmarks.harness.lookalikes", *map(str, (mib, RICH, PER_RICH, seed))]
            child = stack.enter_context(
                subprocess.Popen(words, cwd=machine.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert child.stdout is not None
            pid, address = map(int, child.stdout.readline().split())
            found.append((pid, address))
        yield found


def sums(processes: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the PSS of all processes in bytes, and the number of their huge pages."""
    pss = sum(total(pid, "Pss_Anon") for pid, _ in processes)
    return pss, sum(total(pid, "AnonHugePages") for pid, _ in processes) // LARGE_PAGE


def run_ksm_alone(processes: list[tuple[int, int]], mib: int) -> float:
    """Register all memory of the processes with KSM, and run KSM until it merges few further pages.

    Return the CPU time of ksmd, seconds.
    """
    for pid, address in processes:
        with process_target(pid) as target:
            ranges.advise(target, Range(pid, address, mib << 20), Advice.MERGEABLE)
    return asyncio.run(ksm.run_once()).cpu


def run_pageferry(processes: list[tuple[int, int]], found: dict[str, Any], threshold: int) -> float:
    """Share only the selected huge pages of the processes, and add the statistics to `found`.

    Return the CPU time of pageferry and ksmd, seconds.
    """
    names = [f"pid:{pid}" for pid, _ in processes]
    begin = time.process_time()
    result = asyncio.run(api.share_async(names, threshold=threshold, merge_with_others=True))
    found |= {
        "estimate-mib": (result.estimated or 0) / 2**20,
        "freed-of-estimate": (result.freed or 0) / result.estimated if result.estimated else None,
        "chosen": result.large_pages_chosen,
        "scan-gib-s": result.scan.scanned / 2**30 / (result.scan.ms / 1e3),
    }
    return time.process_time() - begin + (result.ksm_cpu_ms or 0) / 1e3


def measure(line: str, mib: int) -> dict[str, Any]:
    """Measure one line with new processes."""
    with lookalikes(mib) as processes:
        pss, large = sums(processes)
        found: dict[str, Any] = {"line": line, "large-pages": large}
        begin = time.monotonic()
        if line == "KSM alone":
            cpu = run_ksm_alone(processes, mib)
        else:
            cpu = run_pageferry(processes, found, int(line.split()[-1]))
        pss_after, large_after = sums(processes)
        found |= {"freed-mib": (pss - pss_after) / 2**20, "broken": large - large_after, "cpu-s": cpu}
        return found | {"seconds": time.monotonic() - begin}


def scan_rates(mib: int) -> Run:
    """Measure the scan rates of one thread, GB per CPU second: shared file, other process, and plain copy."""
    fd, _ = memory_file(mib << 20)
    mapping = Mapping(fd, mib << 20)
    memory = memoryview(mapping).cast("B")
    for at in range(0, mib << 20, LARGE_PAGE):
        memory[at : at + LARGE_PAGE] = os.urandom(LARGE_PAGE)
    copy = bytearray(1 << 20)  # the copy stays in the CPU cache, so that only the reads take time
    rates: dict[str, list[float]] = {"copy": [], "file": [], "process": []}
    with lookalikes(mib) as processes:
        pid, address = processes[0]
        for _ in range(5):
            begin = time.process_time()
            for at in range(0, mib << 20, len(copy)):
                copy[: len(copy)] = memory[at : at + len(copy)]
            rates["copy"].append((mib << 20) / 1e9 / (time.process_time() - begin))
            for name, source, start in (("file", mapping, 0), ("process", Space(pid), address)):
                scan = SharingScan([(0, source, start, mib << 20)], 1 << 24)
                begin = time.process_time()
                looked = 0
                while step := scan.step(64 << 20, 1):
                    looked += step
                rates[name].append(looked / 1e9 / (time.process_time() - begin))
    memory.release()
    os.close(fd)
    return {"threads": 1} | {name: median(found) for name, found in rates.items()}


LINES = ("KSM alone", "pageferry, threshold 64", "pageferry, threshold 256")
SAVING = 0.9
"""Minimum fraction of KSM's saving. A line that frees less is not credited with the huge pages that it preserves."""


def measure_ksm(setting: Setting) -> list[Run]:
    """Measure the lines in turn, in reverse order in every second repetition."""
    lines = [line for number in range(setting.repetitions) for line in (LINES if number % 2 == 0 else LINES[::-1])]
    return [measure(line, size(setting)) for line in lines]


def measure_rates(setting: Setting) -> list[Run]:
    """Measure the scan rates once per repetition."""
    return [scan_rates(size(setting)) for _ in range(setting.repetitions)]


def size(setting: Setting) -> int:
    """Return the memory of each process, MiB."""
    return 64 if setting.quick else 512


def judge(results: Results) -> list[Target]:
    """Return the targets of S9."""
    alone, *ours = (having(results["ksm"], line=line) for line in LINES)
    freed, broken = median_of(alone, "freed-mib"), median_of(alone, "broken")
    fewer = [
        broken / max(median_of(line, "broken"), 1) for line in ours if median_of(line, "freed-mib") >= SAVING * freed
    ]
    errors = [abs(1 - part) * 100 for line in ours for part in values(line, "freed-of-estimate")]
    slowest = min(median_of(results["rates"], name) for name in ("file", "process"))
    return [
        at_least("fewer huge pages split than by KSM alone, for 90 % of its saving", max(fewer, default=None), 3, "x"),
        at_most("estimate against freed memory, worst case", max(errors, default=None), 2, "%", 2),
        at_least("scan, one thread", slowest, 2.5, "GB/s"),
    ]


def tables(results: Results) -> list[str]:
    """Return headings and tables."""
    ksm_columns = (
        ("freed, MiB", "freed-mib", 1, 1),
        ("huge pages split", "broken", 0, 1),
        ("freed / estimate", "freed-of-estimate", 3, 1),
        ("CPU, s", "cpu-s", 2, 1),
        ("s", "seconds", 1, 1),
    )
    rates = (("copy", "copy", 1, 1), ("shared file", "file", 1, 1), ("other process", "process", 1, 1))
    return [
        f"### {PROCESSES} processes, of which one huge page in {RICH} is worth splitting",
        table(results["ksm"], ("line",), ksm_columns),
        "### Scan and plain copy of the same memory, GB per second of CPU",
        table(results["rates"], ("threads",), rates),
    ]


BENCH = Bench(name="sharing", questions={"ksm": measure_ksm, "rates": measure_rates}, judge=judge, tables=tables)

if __name__ == "__main__":
    machine.require("bench-sharing")
    sys.exit(BENCH.main())
