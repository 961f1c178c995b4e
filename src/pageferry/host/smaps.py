"""What a process maps and how: the lines of /proc/PID/smaps (proc(5)), one record per mapping; bytes, as in `proc`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pageferry.errors import UnsupportedError
from pageferry.host import proc
from pageferry.host.proc import Mapping, parse_mapping

_MAX_MAPPINGS = Path("/proc/sys/vm/max_map_count")


@dataclass(frozen=True, slots=True)
class Smap:
    """A mapping with its accounting."""

    mapping: Mapping
    """Where it is and what is behind it; inode 0: no file."""
    counts: dict[str, int]
    """Bytes by the kernel's names: `Rss`, `Pss`, `Referenced`, `Anonymous`, `AnonHugePages`, `ShmemPmdMapped`, ..."""
    flags: frozenset[str]
    """VmFlags: `uw` registered for write protection, `hg`/`nh` advised (not) to be huge, `mg` mergeable, `lo` locked"""

    @property
    def large_mapped(self) -> int:
        """Bytes that are mapped as large pages."""
        return sum(self.counts.get(name, 0) for name in ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"))


def smaps(pid: int) -> list[Smap]:
    """All mappings of a process, by address. Raises WorkloadDied, and UnsupportedError without the right to look."""
    found: list[Smap] = []
    mapping: Mapping | None = None
    counts: dict[str, int] = {}
    for line in _lines(pid, "smaps"):
        # The first line of a mapping ends with a path, which may look like any other line.
        if (begun := parse_mapping(line)) is not None:
            mapping, counts = begun, {}
            continue
        name, _, rest = line.partition(b":")
        if name == b"VmFlags" and mapping is not None:  # the last line of a mapping
            found.append(Smap(mapping, counts, frozenset(rest.decode().split())))
        elif rest.endswith(b" kB"):
            counts[name.decode()] = int(rest.split()[0]) << 10
    return found


def referenced(pid: int, wanted: Iterable[int], length: int) -> dict[int, int]:
    """Bytes accessed (`Referenced`) of those mappings that start at a wanted address and have that length.

    Reads no more of smaps than that, since it is done often. Raises WorkloadDied when the process is gone.
    """
    text = b"\n" + proc.read(pid, "smaps")
    counts, position = {}, 0
    for address in sorted(wanted):
        found = text.find(b"\n%08x-%08x " % (address, address + length), position)
        if found >= 0:
            position = text.index(b"\nReferenced:", found)
            counts[address] = int(text[position + 12 : position + 40].split()[0]) << 10
    return counts


def rollup(pid: int) -> dict[str, int]:
    """Bytes by the kernel's names (`Rss`, `Pss_Anon`, `AnonHugePages`, ...) over all mappings, from smaps_rollup.

    Raises WorkloadDied when the process is gone, UnsupportedError without the right to look.
    """
    lines = _lines(pid, "smaps_rollup")
    return {line.partition(b":")[0].decode(): int(line.split()[-2]) << 10 for line in lines if line.endswith(b" kB")}


def total(pid: int, name: str) -> int:
    """Bytes of one count of `rollup`; 0 where the kernel does not know it. Raises as that."""
    return rollup(pid).get(name, 0)


def spare_mappings(pid: int) -> int:
    """Mappings that a process can be given so that it still has half of those it may have. Raises as `smaps`."""
    return max(int(_MAX_MAPPINGS.read_text()) // 2 - len(smaps(pid)), 0)


def _lines(pid: int, name: str) -> list[bytes]:
    """Of a file in the process's folder."""
    try:
        return proc.lines(proc.read(pid, name))
    except PermissionError as refused:
        raise UnsupportedError(
            f"cannot read the memory map of process {pid}: permission denied; run as its owner or as root"
        ) from refused
