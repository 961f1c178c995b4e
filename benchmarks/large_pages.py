"""What sampling of large pages (S3) costs a workload, per page and as slowdown, and whether what it says is true.

A process reads memory at random while 0, 1, 5, 25 or 100 % of its large pages are sampled per second, in windows of 200
ms. Stretches with and without sampling alternate, and each is compared with the one before it, in one run: by time, and
by the reader's own time on a CPU, which other load on the machine disturbs less. Another process reads known numbers of
small pages, for the truth. At last a workload that writes to a part of its memory has the rest sent to a store, and
brought back. `--quick` is for trying it out.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measuring.statistics import median, spread
from benchmarks.sampling.reader import truth
from pageferry._engine import LARGE_PAGE, Space
from pageferry.large_pages import Options, Target, open_target, process_target, sample, undo

PARTS = (0.01, 0.05, 0.25, 1.0)
"""Of the large pages, sampled per second."""
WINDOW = 0.2


class Reader:
    """The process, as a target of nothing but its memory."""

    def __init__(self, process: subprocess.Popen[str], size: int) -> None:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        self.pid, self.address, self.size = process.pid, said["address"], size
        self.counter = Path(said["counter"])

    def count(self) -> int:
        return int.from_bytes(self.counter.read_bytes(), "little")

    def on_cpu(self) -> float:
        """Seconds that it has run, kernel included (proc(5), /proc/PID/schedstat)."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def target(self) -> Target:
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
    command = [sys.executable, "-m", "benchmarks.sampling.reader", kind, str(mebibytes), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        one = Reader(process, mebibytes << 20)
        try:
            yield one
        finally:
            process.kill()
            one.counter.unlink()


async def stretch(one: Reader, part: float, seconds: float) -> tuple[float, float, list[float]]:
    """Accesses per second, and per second on a CPU, while that part is sampled; CPU microseconds per page sampled."""
    costs = []
    begin, before, ran = time.monotonic(), one.count(), one.on_cpu()
    with one.target() as target:
        while (left := begin + seconds - time.monotonic()) > 0:
            if part:
                result = await sample(target, Options(sample=part, budget=None, window=WINDOW, rounds=1))
                costs.append(result.overhead.per_page_us)
                left = min(begin + seconds, begin + len(costs)) - time.monotonic()
            await asyncio.sleep(max(left, 0))
    count = one.count() - before
    return count / (time.monotonic() - begin), count / (one.on_cpu() - ran), costs


async def slowdown(kind: str, mebibytes: int, repetitions: int, seconds: float) -> list[dict[str, Any]]:
    rows = []
    with reader(kind, mebibytes, "random") as one:
        await stretch(one, 0, 1)
        runs: dict[float, list[tuple[float, float, list[float]]]] = {part: [] for part in PARTS}
        for _ in range(repetitions):
            for part in PARTS:
                alone, alone_cpu, _ = await stretch(one, 0, seconds)
                sampled, sampled_cpu, costs = await stretch(one, part, seconds)
                runs[part].append(((1 - sampled / alone) * 100, (1 - sampled_cpu / alone_cpu) * 100, costs))
        for part, found in runs.items():
            slower, costs = [run[0] for run in found], [cost for run in found for cost in run[2]]
            dearer = [run[1] for run in found]
            rows.append(
                {
                    "kind": kind,
                    "sampled-per-second": part,
                    "slowdown-percent": slower,
                    "slowdown-on-cpu-percent": dearer,
                    "us-per-page": costs,
                }
            )
            print(
                f"{kind:6} {part:4.0%}/s  slowdown {spread(slower, 1)} %, per second on a CPU {spread(dearer, 1)} %, "
                f"{spread(costs)} us of CPU a page",
                flush=True,
            )
        large = one.large()
        print(f"{kind:6} large mappings afterwards: {large} of {mebibytes // 2}")
    return rows


async def accuracy(kind: str, mebibytes: int) -> dict[str, Any]:
    wrong, samples = [], 0
    with reader(kind, mebibytes, "pattern") as one, one.target() as target:
        before = one.large()
        result = await sample(target, Options(sample=1.0, budget=None, window=WINDOW, rounds=5))
        for found in result.samples:
            expected = truth((found.address - one.address) // LARGE_PAGE)
            samples += 1
            if found.activity != expected:
                wrong.append((expected, found.activity))
        after = one.large()
    print(
        f"{kind:6} accuracy: {samples - len(wrong)} of {samples} large pages exactly right; "
        f"large mappings {before}, then {after}"
    )
    if wrong:
        print(f"{kind:6} expected and found: {wrong[:10]}")
    return {"kind": kind, "samples": samples, "wrong": len(wrong), "large-before": before, "large-after": after}


@contextmanager
def ledger(mebibytes: int) -> Iterator[str]:
    """A workload that writes to a quarter of its memory, by its name; must have lost no write at the end."""
    name = f"bench-{os.getpid()}"
    options = {"threads": 1, "working_set": 0.25, "rate": 32 << 20, "compressible": 0.5}
    setup = json.dumps({"name": name, "size": mebibytes << 20, "options": options})
    command = [sys.executable, "-m", "pageferry.workloads.ledger_process", setup]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield name
        finally:
            process.terminate()
            intact = json.loads(process.stdout.readline())["intact"]
    assert intact


async def store(mebibytes: int) -> dict[str, Any]:
    """What of the cold memory of a ledger a store takes, and what it costs."""
    with ledger(mebibytes) as name, tempfile.TemporaryDirectory() as folder, await open_target(name) as target:
        begin = time.monotonic()
        chosen = Options(sample=1.0, budget=None, window=1.0, rounds=1, reclaim="store", store=Path(folder))
        result = await sample(target, chosen)
        reclaimed = time.monotonic()
        back = (await undo(target)).brought_back
        ended = time.monotonic()
    cold = sum((512 - one.activity) << 12 for one in result.samples if one.decision == "break")
    figures = result.store
    assert figures is not None
    print(
        f"store  {cold >> 20} MiB are cold in {result.broken} large pages, {result.reclaimed / cold:.1%} of them "
        f"reclaimed (aim: at least 95 %) in {reclaimed - begin:.1f} s, to {figures.bytes >> 20} MiB; "
        f"{figures.pauses} pauses, the longest {figures.longest_pause_ms:.1f} ms; "
        f"{back >> 20} MiB brought back in {ended - reclaimed:.1f} s; no write was lost"
    )
    return {
        "cold": cold,
        "reclaimed": result.reclaimed,
        "broken": result.broken,
        "stored": figures.bytes,
        "written-meanwhile": figures.written,
        "seconds": reclaimed - begin,
        "pauses": figures.pauses,
        "longest-pause-ms": figures.longest_pause_ms,
        "brought-back": back,
        "undo-seconds": ended - reclaimed,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--size", type=int, default=512, help="MiB (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    args = parser.parse_args()
    repetitions, seconds = (2, 1.0) if args.quick else (8, 2.0)
    results = []
    for kind in ("shared", "anon"):
        results += await slowdown(kind, args.size, repetitions, seconds)
        results.append(await accuracy(kind, args.size))
    results.append(await store(args.size))
    at_5 = next(row for row in results if row["kind"] == "shared" and row.get("sampled-per-second") == 0.05)
    print(
        f"slowdown on shared memory at 5 % per second: {median(at_5['slowdown-percent']):.1f} %, "
        f"per second on a CPU {median(at_5['slowdown-on-cpu-percent']):.1f} % (aim: at most 3 %)"
    )
    if not _vaddr():
        print("damo is not compared: this kernel has no DAMON for virtual addresses (CONFIG_DAMON_VADDR)")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _vaddr() -> bool:
    config = Path("/proc/config.gz")
    return not config.exists() or b"CONFIG_DAMON_VADDR=y" in gzip.decompress(config.read_bytes())


if __name__ == "__main__":
    asyncio.run(main())
