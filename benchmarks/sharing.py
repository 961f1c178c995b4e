"""Sharing (S9): KSM alone over all of the memory against pageferry, which chooses; and how fast pages are looked at.

Every round starts fresh processes with the same memory for each line, the lines in turn. What was freed is the fall of
their PSS, large pages lost that of AnonHugePages, CPU that of ksmd and of pageferry together. Needs root, and a machine
on which nobody else uses KSM. `python benchmarks/sharing.py [--mib 512] [--rounds 3] [--output FILE]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pageferry._engine import LARGE_PAGE, Mapping, SharingScan, Space, large_tmpfs  # noqa: E402
from pageferry.host.smaps import total  # noqa: E402
from pageferry.sharing import api, ksm, ranges  # noqa: E402
from pageferry.sharing.ranges import Range  # noqa: E402
from pageferry.workloads.targets import process_target  # noqa: E402

PROCESSES = 2
RICH, PER_RICH = 8, 300
"""One large page of eight has 300 pages worth sharing; the others have one or two."""


@contextmanager
def lookalikes(mib: int) -> Iterator[list[tuple[int, int]]]:
    """(pid, address) of processes with that much memory each."""
    with ExitStack() as stack:
        found = []
        for seed in range(PROCESSES):
            words = [sys.executable, "-m", "benchmarks.measuring.lookalikes", *map(str, (mib, RICH, PER_RICH, seed))]
            child = stack.enter_context(
                subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert child.stdout is not None
            pid, address = map(int, child.stdout.readline().split())
            found.append((pid, address))
        yield found


def sums(processes: list[tuple[int, int]]) -> tuple[int, int]:
    """(PSS in bytes, large pages) of all of them."""
    pss = sum(total(pid, "Pss_Anon") for pid, _ in processes)
    return pss, sum(total(pid, "AnonHugePages") for pid, _ in processes) // LARGE_PAGE


def run_ksm_alone(processes: list[tuple[int, int]], mib: int) -> float:
    """All memory given to KSM. Returns seconds of CPU."""
    for pid, address in processes:
        with process_target(pid) as target:
            ranges.advise(target, Range(pid, address, mib << 20), ranges.MERGEABLE)
    return asyncio.run(ksm.run_once()).cpu


def run_pageferry(processes: list[tuple[int, int]], found: dict[str, Any], threshold: int) -> float:
    """Chosen large pages only. Returns seconds of CPU."""
    names = [f"pid:{pid}" for pid, _ in processes]
    begin = time.process_time()
    result = asyncio.run(api.share(names, threshold=threshold, beside_others=True))
    found |= {
        "estimate-mib": (result.estimated or 0) / 2**20,
        "freed-of-estimate": (result.freed or 0) / max(result.estimated or 1, 1),
        "chosen": result.large_pages_chosen,
        "scan-gib-s": result.scan.looked_at / 2**30 / (result.scan.ms / 1e3),
    }
    return time.process_time() - begin + (result.ksm_cpu_ms or 0) / 1e3


def measure(line: str, mib: int) -> dict[str, Any]:
    """One line in fresh processes."""
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


def scan_rates(mib: int) -> dict[str, float]:
    """GiB per second of CPU over data: in a shared file, in another process; and of a plain copy, for comparison."""
    directory = large_tmpfs((mib << 20) + LARGE_PAGE)
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600, dir_fd=directory)
    os.close(directory)
    os.ftruncate(fd, mib << 20)
    mapping = Mapping(fd, mib << 20)
    memory = memoryview(mapping).cast("B")
    for at in range(0, mib << 20, LARGE_PAGE):
        memory[at : at + LARGE_PAGE] = os.urandom(LARGE_PAGE)
    copy = bytearray(1 << 20)  # stays in the cache: what is measured is reading
    rates: dict[str, list[float]] = {"copy": [], "file": [], "process": []}
    with lookalikes(mib) as processes:
        pid, address = processes[0]
        for _ in range(5):
            begin = time.process_time()
            for at in range(0, mib << 20, len(copy)):
                copy[: len(copy)] = memory[at : at + len(copy)]
            rates["copy"].append(mib / 1024 / (time.process_time() - begin))
            for name, source, start in (("file", mapping, 0), ("process", Space(pid), address)):
                scan = SharingScan([(0, source, start, mib << 20)], 1 << 24)
                begin = time.process_time()
                looked = 0
                while step := scan.step(64 << 20, 1):
                    looked += step
                rates[name].append(looked / 2**30 / (time.process_time() - begin))
    memory.release()
    os.close(fd)
    return {name: median(found) for name, found in rates.items()}


def main() -> None:
    """Measure, print, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    runs = []
    lines = ("KSM alone", "pageferry, threshold 64", "pageferry, threshold 256")
    for number in range(args.rounds):
        for line in lines if number % 2 == 0 else reversed(lines):
            runs.append(measure(line, args.mib))
            print(json.dumps(runs[-1]), flush=True)
    rates = scan_rates(args.mib)
    medians = {line: _median([run for run in runs if run["line"] == line]) for line in lines}
    print(f"\n{PROCESSES} processes of {args.mib} MiB, medians of {args.rounds} rounds")
    alone = medians["KSM alone"]
    for line, found in medians.items():
        saved, lost = found["freed-mib"] / alone["freed-mib"], alone["broken"] / max(found["broken"], 1)
        print(
            f"{line:26} freed {found['freed-mib']:7.1f} MiB ({saved:6.1%} of KSM alone), {found['broken']:4.0f} large "
            f"pages broken ({lost:4.1f}x fewer), {found['cpu-s']:5.2f} s CPU, {found['seconds']:5.1f} s"
        )
    print("looking, GiB per second of CPU: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
    if args.output:
        args.output.write_text(json.dumps({"runs": runs, "medians": medians, "rates": rates}, indent=1) + "\n")


def _median(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in runs[0] if name != "line"}


if __name__ == "__main__":
    main()
