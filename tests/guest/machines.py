"""Command lines of test guests, and moving a guest's memory by hand."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pageferry.workloads.base import Region
from tests.guest.serial import Serial

_CHUNK = 2 << 20


@dataclass(frozen=True, slots=True)
class GuestParts:
    """What every command line needs, for one of the QEMUs."""

    qemu: Path
    kernel: Path
    initrd: Path

    def command(self, serial: Serial, *options: str, memory: str = "256M", checker: str = "ferry.mib=64") -> list[str]:
        """A guest that boots the checker; `checker`: its options, see checker.rs."""
        boot = ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", f"console=ttyS0 quiet {checker}"]
        return [*self.bare("-m", memory, "-serial", f"file:{serial.path}"), *boot, *options]

    def bare(self, *options: str) -> list[str]:
        """A machine without a guest, which is enough for much."""
        return [str(self.qemu), "-accel", "tcg", "-display", "none", "-nodefaults", "-sandbox", "on", *options]


def copy_memory(source: Sequence[Region], destination: Sequence[Region]) -> None:
    """Copy what is not zero of paused memory into fresh memory, region by region."""
    for ours, theirs in zip(source, destination, strict=True):
        with mmap.mmap(theirs.fd, theirs.file_offset + theirs.length) as memory:  # hugetlbfs takes no write(2)
            for position in _data(ours):
                data = os.pread(ours.fd, _CHUNK, position)
                if data.count(0) != len(data):
                    there = position - ours.file_offset + theirs.file_offset
                    memory[there : there + len(data)] = data


def _data(region: Region) -> Iterator[int]:
    """Where chunks begin that hold something: reading the others would allocate nothing, but take for ever."""
    position, end = region.file_offset, region.file_offset + region.length
    while position < end:
        try:
            position = os.lseek(region.fd, position, os.SEEK_DATA) // _CHUNK * _CHUNK
        except OSError:  # only holes are left
            return
        yield position
        position += _CHUNK
