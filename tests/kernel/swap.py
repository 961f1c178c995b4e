"""Swap space in compressed memory (zram), for the duration of a test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def swap_space(length: int) -> Iterator[None]:
    """Use a zram device of `length` bytes as swap. Skip the test if the host has no zram or no zram device node."""
    control = Path("/sys/class/zram-control")
    if not control.exists():
        pytest.skip("no zram on this kernel")
    number = (control / "hot_add").read_text().strip()
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(length))
        if not Path(f"/dev/zram{number}").exists():
            pytest.skip("no device node for zram")
        for step in ("mkswap", "swapon"):
            subprocess.run([step, f"/dev/zram{number}"], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", f"/dev/zram{number}"], check=True)
    finally:
        (control / "hot_remove").write_text(number)
