"""What /proc/meminfo says of the host's memory (proc(5))."""

from __future__ import annotations

from pathlib import Path


def meminfo() -> dict[str, int]:
    """Bytes by the kernel's names; counts without a unit are left out."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            found[name] = int(rest.split()[0]) << 10
    return found


def available() -> float:
    """Part of the memory that can be had without swapping."""
    counts = meminfo()
    return counts["MemAvailable"] / counts["MemTotal"]
