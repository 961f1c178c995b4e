"""Kernel statistics of a process: CPU time, page faults, huge page mappings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_LARGE_KIB = 2048


def _fields(path: str) -> list[str]:
    text = Path(path).read_text()
    return text[text.rindex(")") + 2 :].split()


def cpu_seconds(pid: int) -> float | None:
    """Return the user and system time of all threads of a process, seconds; None if it has exited."""
    try:
        fields = _fields(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (int(fields[11]) + int(fields[12])) / _TICK


def faults(pid: int, threads: Iterable[int]) -> int:
    """Return the number of minor and major page faults of these threads of a process."""
    every = [_fields(f"/proc/{pid}/task/{thread}/stat") for thread in threads]
    return sum(int(fields[7]) + int(fields[9]) for fields in every)


def large_mappings(pid: int, size: int) -> int:
    """Return the number of PMD-mapped huge pages in writable, non-executable mappings of at least `size` bytes."""
    total, counted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            permissions = rest[:4]
            counted = end - start >= size and "w" in permissions and "x" not in permissions
        elif counted and first in ("AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"):
            total += int(rest.split()[0])
    return total // _LARGE_KIB


class Meter:
    """CPU time of processes since construction; for a process that has exited, the last value read."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._start = {pid: cpu_seconds(pid) or 0.0 for pid in pids}
        self._last = dict(self._start)

    def read(self) -> float:
        """Return the CPU time of all processes together, seconds."""
        for pid in self._last:
            self._last[pid] = cpu_seconds(pid) or self._last[pid]
        return sum(self._last[pid] - self._start[pid] for pid in self._last)
