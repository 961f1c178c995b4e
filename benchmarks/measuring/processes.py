"""What the kernel has counted for a process: CPU time, faults, large mappings."""

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
    """User and system time of all threads that a process has had; None when it is gone."""
    try:
        fields = _fields(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return (int(fields[11]) + int(fields[12])) / _TICK


def faults(pid: int, threads: Iterable[int]) -> int:
    """Page faults, minor and major, of these threads."""
    every = [_fields(f"/proc/{pid}/task/{thread}/stat") for thread in threads]
    return sum(int(fields[7]) + int(fields[9]) for fields in every)


def large_mappings(pid: int, size: int) -> int:
    """2 MiB mappings of guest memory: those of data mappings of at least `size` bytes (smaps; code is not data)."""
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
    """CPU time of processes from now on; what was counted last for one that goes away stays."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._start = {pid: cpu_seconds(pid) or 0.0 for pid in pids}
        self._last = dict(self._start)

    def read(self) -> float:
        """Seconds of all of them so far."""
        for pid in self._last:
            self._last[pid] = cpu_seconds(pid) or self._last[pid]
        return sum(self._last[pid] - self._start[pid] for pid in self._last)
