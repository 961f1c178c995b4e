"""Mappings of a process from /proc/PID/smaps (proc(5)), one record per mapping; sizes in bytes."""

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
    """Mapping with its memory accounting."""

    mapping: Mapping
    """Address range and file; inode 0 if there is no file."""
    counts: dict[str, int]
    """Sizes by the kernel's names, bytes: `Rss`, `Pss`, `Referenced`, `AnonHugePages`, `ShmemPmdMapped`, ..."""
    flags: frozenset[str]
    """VmFlags: `uw` registered for write protection, `hg` and `nh` advised to use huge pages and not to use them, `mg`
    mergeable, `lo` locked."""

    @property
    def large_mapped(self) -> int:
        """Number of bytes mapped as huge pages."""
        return sum(self.counts.get(name, 0) for name in ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"))


def smaps(pid: int) -> list[Smap]:
    """Return all mappings of a process by address. Raises WorkloadDied, and UnsupportedError without permission."""
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
    """Return the accessed bytes (`Referenced`) of the mappings that start at one of the `wanted` addresses, by address.

    Only mappings of `length` bytes are included, and no more of smaps is parsed than necessary, because the function is
    called often. Raises WorkloadDied if the process has exited.
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
    """Return the sizes (bytes) over all mappings by the kernel's names (`Rss`, `Pss_Anon`, ...), from smaps_rollup.

    Raises WorkloadDied if the process has exited, UnsupportedError without permission.
    """
    lines = _lines(pid, "smaps_rollup")
    return {line.partition(b":")[0].decode(): int(line.split()[-2]) << 10 for line in lines if line.endswith(b" kB")}


def total(pid: int, name: str) -> int:
    """Return one size of `rollup`, bytes; 0 if the kernel does not report it. Raises the same errors as `rollup`."""
    return rollup(pid).get(name, 0)


def spare_mappings(pid: int) -> int:
    """Return the number of mappings that a process can add before it reaches half of its limit (vm.max_map_count).
    Raises the same errors as `smaps`."""
    return max(int(_MAX_MAPPINGS.read_text()) // 2 - len(smaps(pid)), 0)


def _lines(pid: int, name: str) -> list[bytes]:
    """Return the lines of a file in /proc/PID. Raises WorkloadDied, and UnsupportedError without permission."""
    try:
        return proc.lines(proc.read(pid, name))
    except PermissionError as refused:
        raise UnsupportedError(
            f"cannot read the memory map of process {pid}: permission denied; run as its owner or as root"
        ) from refused
