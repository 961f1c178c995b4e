"""Benchmark of huge page sampling (S3): `make bench-large-pages`, or `python -m benchmarks.large_pages [--quick]`.

The benchmark measures the cost of sampling for a workload, and the accuracy of the results:

- Cost: a process reads memory at random while 1, 5, 25 or 100 % of its huge pages are sampled per second, in windows of
  200 ms. Periods without and with sampling alternate. Each period with sampling is compared with the period before it,
  by wall-clock time and by the CPU time of the reader. CPU time depends less on other load on the machine.
- Accuracy: another process reads known numbers of base pages.
- Cold store: the cold memory of a workload that writes to a quarter of its memory is evicted and reloaded.

The benchmark writes raw data and tables to benchmarks/results. The exit code is 0 unless an operation failed. Missed
targets are printed, but are not errors.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import machine
from benchmarks.harness.bench import Bench, Results, Setting
from benchmarks.harness.statistics import median, median_of, values
from benchmarks.harness.tables import Run, Target, at_least, at_most, table
from benchmarks.large_pages.reader import truth
from pageferry._engine import LARGE_PAGE, Space
from pageferry.host.python import start_python
from pageferry.large_pages import Options, open_target_async, process_target, sample_async, undo_async
from pageferry.workloads.target import Target as Memory

PARTS = (0.01, 0.05, 0.25, 1.0)
"""Fractions of the huge pages that are sampled per second."""
WINDOW = 0.2
KINDS = ("shared", "anon")


class Reader:
    """Reader process, and a target that is restricted to its memory."""

    def __init__(self, process: subprocess.Popen[str], size: int) -> None:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        self.pid, self.address, self.size = process.pid, said["address"], size
        self.counter = Path(said["counter"])

    def count(self) -> int:
        return int.from_bytes(self.counter.read_bytes(), "little")

    def on_cpu(self) -> float:
        """Return the CPU time of the reader, user and kernel, in seconds (proc(5), /proc/PID/schedstat)."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def target(self) -> Memory:
        target = process_target(self.pid)
        found = next(area for area in target.areas if area.address <= self.address < area.end)
        offset = found.offset + self.address - found.address
        target.areas = (replace(found, address=self.address, length=self.size, offset=offset),)
        return target

    def large(self) -> int:
        runs = Space(self.pid).large_mapped(self.address, self.size)
        return sum(end - start for start, end in runs) // LARGE_PAGE


@contextmanager
def reader(kind: str, mebibytes: int, mode: str) -> Iterator[Reader]:
    command = [sys.executable, "-m", "benchmarks.large_pages.reader", kind, str(mebibytes), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=machine.ROOT) as process:
        one = Reader(process, mebibytes << 20)
        try:
            yield one
        finally:
            process.kill()
            one.counter.unlink()


async def stretch(one: Reader, part: float, seconds: float) -> tuple[float, float, list[float]]:
    """Sample a fraction of the huge pages each second, for `seconds`.

    Return the accesses per second, the accesses per CPU second, and the CPU microseconds per sampled page.
    """
    costs = []
    begin, before, ran = time.monotonic(), one.count(), one.on_cpu()
    with one.target() as target:
        while (left := begin + seconds - time.monotonic()) > 0:
            if part:
                result = await sample_async(target, Options(sample=part, budget=None, window=WINDOW, rounds=1))
                costs.append(result.overhead.per_page_us)
                left = min(begin + seconds, begin + len(costs)) - time.monotonic()
            await asyncio.sleep(max(left, 0))
    count = one.count() - before
    return count / (time.monotonic() - begin), count / (one.on_cpu() - ran), costs


async def slowdown(kind: str, mebibytes: int, repetitions: int, seconds: float) -> list[Run]:
    """Measure each fraction in turn. Return one row per fraction and repetition."""
    rows: list[Run] = []
    with reader(kind, mebibytes, "random") as one:
        await stretch(one, 0, 1)
        before = one.large()
        for _ in range(repetitions):
            for part in PARTS:
                alone, alone_cpu, _ = await stretch(one, 0, seconds)
                sampled, sampled_cpu, costs = await stretch(one, part, seconds)
                rows.append(
                    {
                        "memory": kind,
                        "sampled per second": f"{part:.0%}",
                        "slowdown-percent": (1 - sampled / alone) * 100,
                        "slowdown-on-cpu-percent": (1 - sampled_cpu / alone_cpu) * 100,
                        "us-per-page": median(costs),
                        "large-lost": before - one.large(),
                    }
                )
    return rows


async def accuracy(kind: str, mebibytes: int) -> Run:
    """Sample a reader with a known pattern. Return the percentage of huge pages whose activity is exact."""
    wrong, samples = [], 0
    with reader(kind, mebibytes, "pattern") as one, one.target() as target:
        before = one.large()
        result = await sample_async(target, Options(sample=1.0, budget=None, window=WINDOW, rounds=5))
        for found in result.samples:
            expected = truth((found.address - one.address) // LARGE_PAGE)
            samples += 1
            if found.activity != expected:
                wrong.append((expected, found.activity))
        after = one.large()
    return {
        "memory": kind,
        "samples": samples,
        "right-percent": 100 * (1 - len(wrong) / max(samples, 1)),
        "wrong": wrong[:10],
        "large-before": before,
        "large-lost": before - after,
    }


@contextmanager
def ledger(mebibytes: int) -> Iterator[str]:
    """Yield the name of a workload that writes to a quarter of its memory. Check at the end that no write was lost."""
    name = f"bench-{os.getpid()}"
    options = {"threads": 1, "working_set": 0.25, "rate": 32 << 20, "compressible": 0.5}
    setup = json.dumps({"name": name, "size": mebibytes << 20, "options": options})
    with start_python("pageferry.demo.process", setup, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield name
        finally:
            process.terminate()
            intact = json.loads(process.stdout.readline())["intact"]
    assert intact


async def store(mebibytes: int) -> Run:
    """Evict the cold memory of a ledger to a cold store, and reload it. Return sizes and costs."""
    with ledger(mebibytes) as name, tempfile.TemporaryDirectory() as folder, await open_target_async(name) as target:
        begin = time.monotonic()
        chosen = Options(sample=1.0, budget=None, window=1.0, rounds=1, reclaim="store", store=Path(folder))
        result = await sample_async(target, chosen)
        reclaimed = time.monotonic()
        back = (await undo_async(target)).reloaded
        ended = time.monotonic()
    cold = sum((512 - one.activity) << 12 for one in result.samples if one.decision == "break")
    figures = result.store
    assert figures is not None
    return {
        "workload": f"ledger of {mebibytes} MiB, no write lost",
        "cold": cold,
        "reclaimed": result.reclaimed,
        "reclaimed-percent": 100 * result.reclaimed / cold,
        "broken": result.broken,
        "stored": figures.bytes,
        "written-meanwhile": figures.written,
        "seconds": reclaimed - begin,
        "pauses": figures.pauses,
        "longest-pause-ms": figures.longest_pause_ms,
        "reloaded": back,
        "undo-seconds": ended - reclaimed,
    }


def size(setting: Setting) -> int:
    """Return the size of the sampled memory, MiB."""
    return 128 if setting.quick else 512


def measure_slowdown(setting: Setting) -> list[Run]:
    """Measure shared and private memory. The differences are small, which requires three times as many repetitions."""
    repetitions, seconds = (1, 1.0) if setting.quick else (3 * setting.repetitions, 2.0)
    return [row for kind in KINDS for row in asyncio.run(slowdown(kind, size(setting), repetitions, seconds))]


def measure_accuracy(setting: Setting) -> list[Run]:
    """Measure shared and private memory in turn."""
    return [asyncio.run(accuracy(kind, size(setting))) for _ in range(setting.repetitions) for kind in KINDS]


def measure_store(setting: Setting) -> list[Run]:
    """Measure the eviction to a cold store and the reload."""
    return [asyncio.run(store(size(setting))) for _ in range(setting.repetitions)]


def measure_damo(_: Setting) -> list[Run]:
    """Return whether the host has the `damo` command, and DAMON for virtual addresses; measure nothing."""
    return [{"peer": "damo", "in PATH": shutil.which("damo") is not None, "DAMON for virtual addresses": _vaddr()}]


def _vaddr() -> str:
    """Return whether the kernel supports DAMON for virtual addresses: `yes`, `no` or `not known`.

    Read DAMON's list of operations or, if there is no such list, the kernel's configuration.
    """
    offers = Path("/sys/kernel/mm/damon/admin/kdamonds").glob("*/contexts/*/avail_operations")
    offered = [offer.read_text().split() for offer in offers]
    if offered:
        return "yes" if any("vaddr" in names for names in offered) else "no"
    config = Path("/proc/config.gz")
    if not config.exists():
        return "not known"
    return "yes" if b"CONFIG_DAMON_VADDR=y" in gzip.decompress(config.read_bytes()) else "no"


def judge(results: Results) -> list[Target]:
    """Return the targets of S3."""
    at_5 = [row for row in results["slowdown"] if (row["memory"], row["sampled per second"]) == ("shared", "5%")]
    lost = values([*results["slowdown"], *results["accuracy"]], "large-lost")
    return [
        at_least("huge pages classified exactly", min(values(results["accuracy"], "right-percent")), 100, "%"),
        at_most("slowdown, shared memory, 5 % sampled per second", median_of(at_5, "slowdown-percent"), 3, "%"),
        at_most("huge mappings not restored", max(lost), 0, "", 0),
        at_least("cold memory reclaimed", median_of(results["store"], "reclaimed-percent"), 95, "%"),
    ]


def tables(results: Results) -> list[str]:  # over 40 lines: a table
    """Return headings and tables."""
    damo = results["damo"][0]
    known = f"DAMON for virtual addresses in this kernel: {damo['DAMON for virtual addresses']}"
    return [
        "### Slowdown of a random reader",
        table(
            results["slowdown"],
            ("memory", "sampled per second"),
            (
                ("slowdown, %", "slowdown-percent", 1, 1),
                ("slowdown by CPU time, %", "slowdown-on-cpu-percent", 1, 1),
                ("CPU us per page", "us-per-page", 0, 1),
                ("huge mappings lost", "large-lost", 0, 1),
            ),
        ),
        "### Against a known access pattern",
        table(
            results["accuracy"],
            ("memory",),
            (
                ("huge pages", "samples", 0, 1),
                ("exact, %", "right-percent", 1, 1),
                ("huge mappings lost", "large-lost", 0, 1),
            ),
        ),
        "### Cold memory evicted to a store and reloaded",
        table(
            results["store"],
            ("workload",),
            (
                ("cold, MiB", "cold", 0, 1 << 20),
                ("reclaimed, %", "reclaimed-percent", 1, 1),
                ("stored, MiB", "stored", 0, 1 << 20),
                ("s", "seconds", 1, 1),
                ("pauses", "pauses", 0, 1),
                ("longest pause, ms", "longest-pause-ms", 1, 1),
                ("reload, s", "undo-seconds", 1, 1),
            ),
        ),
        "### damo",
        f"Not compared. {known}; `damo` in PATH: {'yes' if damo['in PATH'] else 'no'}.",
    ]


BENCH = Bench(
    name="large_pages",
    questions={
        "slowdown": measure_slowdown,
        "accuracy": measure_accuracy,
        "store": measure_store,
        "damo": measure_damo,
    },
    judge=judge,
    tables=tables,
)

if __name__ == "__main__":
    machine.require("bench-large-pages")
    sys.exit(BENCH.main())
