"""Examples of the engine that measure one operation each (`crates/engine/examples`); cargo builds them if necessary.

`quick`: use the debug build of `cargo test`, whose figures are meaningless.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from benchmarks.harness.machine import ROOT
from benchmarks.harness.tables import Run


def codec_speed(image: Path, codec: str, quick: bool) -> float:
    """Return the MiB of an image's data pages that one thread compresses per second."""
    return float(_output("codec_speed", quick, str(image), codec).split()[0])


def fault_loop(quick: bool) -> list[Run]:
    """Return the median latencies of an access to missing memory, microseconds: bare loop, pager, and ratio."""
    found = re.findall(r"bare loop (\d+) us, pager (\d+) us", _output("fault_loop", quick, *(["1"] if quick else [])))
    return [{"bare-us": int(bare), "pager-us": int(pager), "ratio": int(pager) / int(bare)} for bare, pager in found]


def fault_threads(quick: bool) -> list[Run]:
    """Return the cost of a fault with several threads that fault at the same time: CPU time of the pager in
    nanoseconds, waits of the pager's threads for each other per 1000 faults, and faults per second."""
    line = r"(\d+) threads: (\d+) faults, (\d+) per second, (\d+) ns of CPU, (\d+) waits per 1000, (\d+) ns waited"
    keys = ("threads", "faults", "faults-s", "cpu-ns", "waits", "waited-ns")
    found = re.findall(line, _output("fault_threads", quick, *(["1", "16"] if quick else [])))
    return [dict(zip(keys, map(int, figures), strict=True)) for figures in found]


def fill_speed(image: Path, quick: bool) -> Run:
    """Return the time to load an image once by a bare loop and by the pager, milliseconds. The bare loop reads the page
    cache; the pager reads the page cache (`warm-ms`), and before that the disk (`cold-ms`)."""
    said = _output("fill_speed", quick, str(image), "1")
    found = re.search(r"bare loop (\d+) ms, pager (\d+) ms cold, (\d+) ms warm", said)
    assert found is not None
    bare, cold, warm = map(int, found.groups())
    stored = re.search(r"(\d+) MiB stored", said)
    assert stored is not None
    return {"bare-ms": bare, "cold-ms": cold, "warm-ms": warm, "stored-mib": int(stored[1])}


def delta(before: Path, after: Path, codec: str, quick: bool) -> tuple[float, float, float, float]:
    """Return the compressed sizes of whole pages and of their deltas, bytes, and one thread's speed for each, MiB/s."""
    whole, differences, whole_speed, speed = map(float, _output("delta", quick, str(before), str(after), codec).split())
    return whole, differences, whole_speed, speed


def _output(name: str, quick: bool, *arguments: str) -> str:
    """Run an example and return its output. Raises CalledProcessError if it fails."""
    profile = "dev" if quick else "release"
    program = ["--profile", profile, "-p", "pageferry-engine", "--example", name]
    command = ["cargo", "run", "--quiet", *program, "--", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
