"""Population of the second-stage page tables of a KVM guest before it runs (S1, S5): KVM_PRE_FAULT_MEMORY.

The first access of the guest to a page causes a fault, even if QEMU has mapped the page, because KVM must map it from
guest-physical to host memory. KVM_PRE_FAULT_MEMORY maps pages in advance (since Linux 6.11;
Documentation/virt/kvm/api.rst 4.143). It is an ioctl of a vCPU, and works only in the process that created the virtual
machine. Therefore, the ioctl is injected into that process (`Space.ioctl`), and uses QEMU's own descriptors, while the
vCPUs are stopped. The position of RAM in guest-physical memory is reported by the monitor command `info mtree -f`; QMP
has no equivalent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from pageferry import _engine
from pageferry._engine import LARGE_PAGE, SMALL_PAGE, Space
from pageferry.errors import WorkloadDied
from pageferry.host.blocking import in_thread
from pageferry.host.qmp import Monitor
from pageferry.memory.regions import Region

_PIECE = 64 << 20
"""Maximum number of bytes mapped per chunk. A thread of QEMU is stopped during each call."""

# From include/uapi/linux/kvm.h.
_CHECK_EXTENSION = 0xAE03
_CAP_PRE_FAULT_MEMORY = 236
_RANGE = struct.Struct("=QQQ40x")
"""struct kvm_pre_fault_memory: gpa, size, flags. The kernel advances gpa, and reduces size, by the bytes mapped."""
_PRE_FAULT_MEMORY = 3 << 30 | _RANGE.size << 16 | 0xAE << 8 | 0xD5

_AGAIN = frozenset({errno.EINTR, errno.EAGAIN})
_LINE = re.compile(r"\s+([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ram\): (\S+)(?: @([0-9a-f]{16}))?(?: |$)")

Range = tuple[int, int]
"""Range of memory: start and end, bytes."""


@dataclass(frozen=True, slots=True)
class RamRange:
    """Position of a part of a memory backend in guest-physical memory, bytes."""

    address: int
    """Guest-physical address."""
    length: int
    offset: int
    """Offset of the part in the backend."""


def ram_ranges(mtree: str, backend: str) -> list[RamRange]:
    """Return the parts of a backend that the vCPUs can access, from the output of `info mtree -f`."""
    found = []
    for line in _system_memory(mtree):
        matched = _LINE.match(line)
        if matched and matched[3] in (backend, f"/objects/{backend}"):
            first, last = int(matched[1], 16), int(matched[2], 16)
            found.append(RamRange(first, last + 1 - first, int(matched[4] or "0", 16)))
    return found


def guest_physical(parts: Iterable[Range], ranges: Iterable[RamRange]) -> list[Range]:
    """Return the positions of parts of a backend in guest-physical memory, as whole pages. `ranges`: result of
    `ram_ranges`."""
    known = list(ranges)
    found = []
    for start, end in parts:
        for one in known:
            first, last = max(start, one.offset), min(end, one.offset + one.length)
            moved = [one.address + edge - one.offset for edge in (first, last)]
            if first < last:
                found.append((moved[0] // SMALL_PAGE * SMALL_PAGE, -(-moved[1] // SMALL_PAGE) * SMALL_PAGE))
    return sorted(found)


@dataclass(frozen=True, slots=True)
class VirtualMachine:
    """Virtual machine of a process, accessed through the descriptors of the process."""

    pid: int
    machine: int
    vcpu: int
    """Descriptor of one vCPU. Any vCPU can be used, because all vCPUs share the page tables."""

    @classmethod
    def find(cls, pid: int) -> Self | None:
        """Find the virtual machine of a process. Return None if there is none, for example in a QEMU without KVM.
        Raises WorkloadDied, PermissionError."""
        machine = vcpu = None
        for number, target in _descriptors(pid):
            if target == "anon_inode:kvm-vm":
                machine = number
            elif target.startswith("anon_inode:kvm-vcpu:"):
                vcpu = number
        return None if machine is None or vcpu is None else cls(pid, machine, vcpu)

    @property
    def can_prefault(self) -> bool:
        """Whether the kernel supports KVM_PRE_FAULT_MEMORY for this virtual machine."""
        return Space(self.pid).ioctl(self.machine, _CHECK_EXTENSION, _CAP_PRE_FAULT_MEMORY) > 0

    def prefault(self, ranges: Iterable[Range]) -> int:
        """Map ranges of guest-physical memory. The vCPUs must be stopped. Return the number of bytes mapped.

        Pages that are not in memory yet are allocated or loaded. Raises OSError with the kernel's reason.
        """
        space = Space(self.pid)
        scratch = space.mmap(SMALL_PAGE)
        try:
            with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
                return sum(self._prefault(space, memory.fileno(), scratch, chunk) for chunk in _chunks(ranges))
        finally:
            space.munmap(scratch, SMALL_PAGE)

    def _prefault(self, space: Space, memory: int, scratch: int, chunk: Range) -> int:
        start, end = chunk
        os.pwrite(memory, _RANGE.pack(start, end - start, 0), scratch)
        while _RANGE.unpack(os.pread(memory, _RANGE.size, scratch))[1]:
            try:
                space.ioctl(self.vcpu, _PRE_FAULT_MEMORY, scratch)
            except OSError as error:
                if error.errno not in _AGAIN:
                    raise
        return end - start


async def prefault(
    monitor: Monitor,
    machine: VirtualMachine,
    regions: Sequence[Region],
    units: Mapping[int, Sequence[int]] | None,
) -> int:
    """Populate the second-stage page tables. `units`: indexes of 2 MiB units, by index of the region; None for all
    memory that is present. Return the number of bytes mapped; 0 if KVM does not support this.

    Raises OSError with the kernel's reason, WorkloadError.
    """
    if not await in_thread(lambda: machine.can_prefault):
        return 0
    mtree = await monitor.execute("human-monitor-command", command_line="info mtree -f")
    wanted: list[Range] = []
    for number, region in enumerate(regions):
        parts = _present(region) if units is None else _units(region, units.get(number, ()))
        wanted += guest_physical(parts, ram_ranges(mtree, region.name))
    return await in_thread(machine.prefault, wanted)


def _present(region: Region) -> list[Range]:
    return _engine.Mapping(region.fd, region.length, region.file_offset).data_ranges()


def _units(region: Region, units: Sequence[int]) -> list[Range]:
    return [(unit * LARGE_PAGE, min((unit + 1) * LARGE_PAGE, region.length)) for unit in units]


def _system_memory(mtree: str) -> Iterator[str]:
    """Yield the lines about the address space `memory`, in which the vCPUs run."""
    for view in mtree.replace("\r", "").split("FlatView #"):
        if '\n AS "memory", root: system\n' in view:
            yield from view.splitlines()


def _chunks(ranges: Iterable[Range]) -> Iterator[Range]:
    for start, end in ranges:
        while start < end:
            edge = min((start // _PIECE + 1) * _PIECE, end)
            yield start, edge
            start = edge


def _descriptors(pid: int) -> Iterator[tuple[int, str]]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"process {pid} has exited") from gone
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            yield int(name), os.readlink(f"{folder}/{name}")
