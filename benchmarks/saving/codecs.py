"""What the block codec does by itself: `crates/engine/examples/codec_speed.rs`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.measuring.machine import ROOT


def run_example(name: str, *arguments: str) -> str:
    """What an example of the engine prints. Built as the engine is, where it is not yet. Raises CalledProcessError."""
    command = ["cargo", "run", "--quiet", "--release", "-p", "pageferry-engine", "--example", name, "--", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def speed(image: Path, codec: str) -> float:
    """MiB of the data pages of an image that one thread codes per second."""
    return float(run_example("codec_speed", str(image), codec).split()[0])
