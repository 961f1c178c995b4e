"""What /proc/meminfo says of the host's memory (proc(5))."""

from __future__ import annotations

from pathlib import Path

from pageferry.host import proc


def meminfo() -> dict[str, int]:
    """Bytes by the kernel's names; counts without a unit are left out."""
    found = {}
    for line in proc.lines(Path("/proc/meminfo").read_bytes()):
        name, _, rest = line.partition(b":")
        if rest.endswith(b" kB"):
            found[name.decode()] = int(rest.split()[0]) << 10
    return found


def available() -> float:
    """Part of the memory that can be had without swapping."""
    counts = meminfo()
    return counts["MemAvailable"] / counts["MemTotal"]
