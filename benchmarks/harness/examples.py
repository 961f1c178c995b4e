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
