"""Rate at which fio reads a file: sequentially, without the page cache, with 32 requests in flight."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

DEPTH, BLOCK = 32, "1m"


def read_rate(file: Path) -> float:
    """Return the rate at which fio reads the whole file, MiB/s. Raises CalledProcessError if fio fails."""
    words = ["fio", "--name=read", f"--filename={file}", "--readonly", "--rw=read", "--direct=1", f"--bs={BLOCK}"]
    words += ["--ioengine=libaio", f"--iodepth={DEPTH}", "--output-format=json"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / (1 << 20)
