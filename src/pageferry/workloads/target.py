"""Targets of huge-page management (S3) and page sharing (S9): memory of a managed workload, or of any process.

A *target* is either a workload of this host (`NAME`) or a process that pageferry does not manage (`pid:N`). The memory
of a process comprises its writable private anonymous mappings and its writable shared mappings of memory files (memfd,
tmpfs, shared anonymous memory). The memory of a target can be inspected, split, collapsed and shared. A process cannot
be paused, saved or migrated as a target.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pageferry import values
from pageferry._engine import Space
from pageferry.errors import NoSuchWorkload, UnsupportedError, UsageError, WorkloadDied
from pageferry.host import proc
from pageferry.host.blocking import synchronous
from pageferry.host.smaps import Smap, smaps
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE, Region, Segment
from pageferry.workloads.managed import managed
from pageferry.workloads.open import open_workload
from pageferry.workloads.protocols import Migratable

Kind = Literal["shared", "anon"]

_NOT_OURS = ("[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]")
"""Mappings without a file that are excluded: they belong to the kernel, or injected system calls use them."""


@dataclass(frozen=True, slots=True)
class Area:
    """Mapping of a target in one process: the unit that is sampled, split or shared."""

    pid: int
    address: int
    length: int
    """Length in bytes. `address` and `length` are multiples of 4 KiB."""
    kind: Kind
    """`shared`: mapping of a memory file, which other processes may map too; `anon`: private anonymous memory."""
    region: int | None
    """Index of the mapped region in the target; None for anonymous memory."""
    offset: int
    """Start of the mapping within that region, bytes."""
    page_size: int
    """Page size in bytes: 4096, or 2 MiB if the file is on hugetlbfs."""
    name: str
    """Name of the region, or of the mapping as printed by the kernel (`[heap]`); may be empty."""

    @property
    def end(self) -> int:
        """First address after the mapping."""
        return self.address + self.length

    def large_pages(self) -> range:
        """Return the addresses of the 2 MiB units that lie completely in the mapping and can be huge pages."""
        if self.kind == "shared" and (self.address - self.offset) % LARGE_PAGE:
            return range(0)  # 2 MiB boundaries of the file are not 2 MiB boundaries of the address space
        first = -(-self.address // LARGE_PAGE) * LARGE_PAGE
        return range(first, self.end - LARGE_PAGE + 1, LARGE_PAGE)


@dataclass(slots=True)
class Target:
    """Memory of one target. Close the object, or use it in a `with` block."""

    name: str
    """Name as given by the caller."""
    regions: tuple[Region, ...]
    """Shared files, each with an open descriptor. A region starts at a multiple of 2 MiB of its file."""
    areas: tuple[Area, ...]
    """Mappings, sorted by process and address."""
    skipped: tuple[str, ...] = ()
    """Mappings that were left out, each with the reason."""
    workload: Migratable | None = None
    """Managed workload; None for a process."""
    _spaces: dict[int, Space] = field(default_factory=dict)
    _started: dict[int, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started = {pid: proc.start_time(pid) for pid in self.pids}

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, sorted."""
        return tuple(sorted({area.pid for area in self.areas}))

    def space(self, pid: int) -> Space:
        """Return the address space of a process of the target. Raises WorkloadDied if the process has exited."""
        try:
            found = self._spaces.get(pid) or self._spaces.setdefault(pid, Space(pid))
        except ProcessLookupError as gone:
            raise WorkloadDied(f"{self.name}: process {pid} has exited") from gone
        except PermissionError as refused:
            raise UnsupportedError(
                f"cannot access process {pid} of {self.name}: permission denied; run as root"
            ) from refused
        self.check_alive(pid)
        return found

    def check_alive(self, pid: int) -> None:
        """Raise WorkloadDied if the process has exited."""
        started = self._started.get(pid)
        if started is None or not proc.is_alive(pid, started):
            raise WorkloadDied(f"{self.name}: process {pid} has exited")

    def close(self) -> None:
        """Close the files. The processes are not changed."""
        if self.workload is not None:
            self.workload.close()
        else:
            for region in self.regions:
                os.close(region.fd)
        self.regions = ()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def open_target_async(text: str) -> Target:
    """Open the target `NAME` or `pid:N`.

    Raises UsageError, NoSuchWorkload, WorkloadDied, WorkloadError if the workload does not reply, UnsupportedError if
    this user cannot inspect the memory.

    Examples:
        >>> import subprocess, pageferry
        >>> program = subprocess.Popen(["sleep", "60"])
        >>> with pageferry.large_pages.open_target(f"pid:{program.pid}") as target:
        ...     print(target.name == f"pid:{program.pid}")
        True
        >>> program.kill()
        >>> program.wait()
        -9
    """
    if values.text("text", text).startswith("pid:"):
        digits = text.removeprefix("pid:")
        if not (digits.isascii() and digits.isdecimal()) or len(digits) > 10:
            raise UsageError(f"invalid process {text}: expected a number after pid:")
        return process_target(int(digits))
    workload = await open_workload(text)
    return workload_target(workload)


open_target = synchronous(open_target_async)


def workload_target(workload: Migratable) -> Target:
    """Return a managed workload as a target. Closing the target closes the workload object.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("4MiB")
        >>> with pageferry.large_pages.workload_target(arena.workload()) as target:
        ...     print(len(target.regions), target.regions[0].length)
        1 4194304
    """
    managed(workload)
    areas = [
        Area(
            pid=segment.pid,
            address=segment.address,
            length=segment.length,
            kind="shared",
            region=number,
            offset=segment.offset,
            page_size=region.page_size,
            name=region.name,
        )
        for number, region in enumerate(workload.regions)
        for segment in region.segments
    ]
    areas.sort(key=lambda area: (area.pid, area.address))
    return Target(workload.name, workload.regions, tuple(areas), workload=workload)


def process_target(pid: int) -> Target:
    """Return a process as a target. Raises NoSuchWorkload if no process has this id, UnsupportedError if access is
    denied.

    Examples:
        >>> import subprocess, pageferry
        >>> program = subprocess.Popen(["sleep", "60"])
        >>> with pageferry.large_pages.process_target(program.pid) as target:
        ...     print(target.workload)  # the process is not managed
        None
        >>> program.kill()
        >>> program.wait()
        -9
    """
    if proc.start_time(values.count("pid", pid, 1, (1 << 31) - 1)) is None:
        raise NoSuchWorkload(f"cannot open process {pid}: there is no such process")
    files = _Files(pid)
    areas: list[Area] = []
    found = smaps(pid)
    try:
        for smap in found:
            if _is_anonymous(smap):
                areas.append(_anonymous(pid, smap))
            elif smap.mapping.shared and smap.mapping.writable and smap.mapping.inode:
                files.add(smap.mapping)
        regions, shared = files.regions()
    except BaseException:
        files.close()
        raise
    areas = sorted([*areas, *shared], key=lambda area: area.address)
    return Target(f"pid:{pid}", tuple(regions), tuple(areas), tuple(files.skipped))


def _is_anonymous(smap: Smap) -> bool:
    """Return whether a mapping is private anonymous memory of the process on which madvise(2) may be used."""
    mapping = smap.mapping
    ours = mapping.inode == 0 and mapping.writable and not mapping.shared and mapping.name not in _NOT_OURS
    return ours and not smap.flags & {"io", "pf", "ht"}  # device memory, raw page frames, hugetlb


def _anonymous(pid: int, smap: Smap) -> Area:
    mapping = smap.mapping
    return Area(pid, mapping.address, mapping.length, "anon", None, 0, SMALL_PAGE, mapping.name)


class _Files:
    """Memory files that a process maps, each opened once."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.skipped: list[str] = []
        self._opened: dict[tuple[int, int], int] = {}
        self._mappings: dict[tuple[int, int], list[proc.Mapping]] = {}

    def add(self, mapping: proc.Mapping) -> None:
        """Add a mapping, and open its file unless it is already open. Skip files that are not memory files."""
        identity = mapping.identity
        if identity not in self._mappings:
            if os.major(mapping.device):  # file on a disk: tmpfs and hugetlbfs have major number 0
                return
            try:
                self._opened[identity] = proc.open_mapped_file(self.pid, mapping)
            except proc.NotInMemory:
                return
            except OSError as error:
                self.skipped.append(f"{mapping.name or hex(mapping.address)}: {error.strerror}")
                return
        self._mappings.setdefault(identity, []).append(mapping)

    def regions(self) -> tuple[list[Region], list[Area]]:
        """Return one region per file, and one area per mapping. Files without a usable mapping are closed."""
        regions: list[Region] = []
        areas: list[Area] = []
        for identity, mappings in self._mappings.items():
            descriptor = self._opened[identity]
            region = self._region(descriptor, mappings)
            if region is None:
                os.close(self._opened.pop(identity))
                continue
            number = len(regions)
            regions.append(region)
            for segment in region.segments:
                where = (segment.pid, segment.address, segment.length)
                areas.append(Area(*where, "shared", number, segment.offset, region.page_size, region.name))
        return regions, areas

    def _region(self, descriptor: int, mappings: list[proc.Mapping]) -> Region | None:
        page_size = os.fstatvfs(descriptor).f_bsize
        size = -(-os.fstat(descriptor).st_size // SMALL_PAGE) * SMALL_PAGE
        first = min(mapping.offset for mapping in mappings) // LARGE_PAGE * LARGE_PAGE
        last = min(max(mapping.offset + mapping.length for mapping in mappings), size)
        segments = tuple(self._segments(mappings, first, last))
        if page_size not in (SMALL_PAGE, LARGE_PAGE) or not segments:
            self.skipped.append(f"{mappings[0].name}: its page size is {page_size} bytes, or no part of it is mapped")
            return None
        return Region(mappings[0].name, last - first, descriptor, first, page_size, segments)

    def _segments(self, mappings: list[proc.Mapping], first: int, last: int) -> Iterator[Segment]:
        for mapping in mappings:
            length = min(mapping.offset + mapping.length, last) - mapping.offset
            if length > 0:
                yield Segment(self.pid, mapping.address, length, mapping.offset - first)

    def close(self) -> None:
        """Close all files, after an error."""
        for descriptor in self._opened.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
