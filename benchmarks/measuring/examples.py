"""Programs of the engine that measure one thing by itself (`crates/engine/examples`), built where they are not yet.

`quick`: as `cargo test` has built them, which is not fast: their figures mean nothing then.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from benchmarks.measuring.machine import ROOT
from benchmarks.measuring.tables import Run


def codec_speed(image: Path, codec: str, quick: bool) -> float:
    """MiB of the data pages of an image that one thread codes per second."""
    return float(_output("codec_speed", quick, str(image), codec).split()[0])


def fault_loop(quick: bool) -> list[Run]:
    """Medians of the time of an access to missing memory: a bare loop and the pager, in turns. Microseconds."""
    found = re.findall(r"bare loop (\d+) us, pager (\d+) us", _output("fault_loop", quick))
    return [{"bare-us": int(bare), "pager-us": int(pager), "ratio": int(pager) / int(bare)} for bare, pager in found]


def delta(before: Path, after: Path, codec: str, quick: bool) -> tuple[float, float, float, float]:
    """Of pages as they are and of their differences from before: bytes of each when coded, and MiB/s of one thread."""
    whole, differences, whole_speed, speed = map(float, _output("delta", quick, str(before), str(after), codec).split())
    return whole, differences, whole_speed, speed


def _output(name: str, quick: bool, *arguments: str) -> str:
    """Raises CalledProcessError."""
    profile = "dev" if quick else "release"
    program = ["--profile", profile, "-p", "pageferry-engine", "--example", name]
    command = ["cargo", "run", "--quiet", *program, "--", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
