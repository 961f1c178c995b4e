"""Memory of a running QEMU guest: its backends, the files behind them, and their mappings in QEMU.

QMP `query-memdev` returns the backends, and `qom-get` their files and offsets; /proc/PID/maps shows where the files are
mapped. A backend is identified by the device and inode of its file. If `mem-path` is a directory, QEMU creates a file
`qemu_back_mem.ID.XXXXXX` in it for each backend and unlinks it (`file_ram_open` of system/physmem.c). If several mapped
files could belong to one backend, the guest is refused.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host import proc
from pageferry.host.qmp import Monitor
from pageferry.memory.regions import LARGE_PAGE, Region, Segment

_ADVICE = (
    "start QEMU with `pageferry run`, or with -object memory-backend-file,id=ram0,size=SIZE,share=on,align=2M,"
    "mem-path=FILE -machine memory-backend=ram0, with FILE on a tmpfs mounted with huge=always; a domain of libvirt "
    "needs <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"
)
_IN_MEMORY = (
    "guest memory must be on tmpfs or hugetlbfs: give a mem-path below /dev/shm, or with libvirt set "
    'memory_backing_dir = "/dev/shm" in /etc/libvirt/qemu.conf, and start the guest again'
)


_MEMFD = "/memfd:memory-backend-memfd"
"""Path that the kernel shows for the memory of each `memory-backend-memfd` (backends/hostmem-memfd.c)."""


@dataclass(frozen=True, slots=True)
class _Backend:
    """Memory backend, as reported by the monitor."""

    name: str
    size: int
    """Size, bytes."""
    path: str
    """Path that was passed to QEMU: a file or a directory; `_MEMFD` for a memfd."""
    offset: int
    """Start of the memory in the file, bytes."""


async def open_regions(monitor: Monitor, pid: int) -> tuple[Region, ...]:
    """Return the regions of guest memory. Each has an open file, which the caller closes.

    Raises UnsupportedError if any of the memory is not in separate shared files on tmpfs or hugetlbfs, PermissionError
    if this process is not permitted to open the files, WorkloadError.
    """
    backends = [await _describe(monitor, item) for item in await _used_backends(monitor)]
    mappings = [mapping for mapping in proc.file_mappings(pid) if mapping.shared and mapping.writable]
    found = [(backend, _mappings_of(pid, backend, mappings)) for backend in backends]
    _check_apart(found)
    regions: list[Region] = []
    try:
        for backend, shown in found:
            regions.append(_open_region(pid, backend, shown))  # opened files are closed below
        await _check_completeness(monitor, sum(region.length for region in regions))
    except BaseException:
        for region in regions:
            os.close(region.fd)
        raise
    return tuple(regions)


def misaligned(region: Region) -> bool:
    """Return whether QEMU maps the file at an address that prevents PMD mappings of its huge pages."""
    return any((segment.address - segment.offset - region.file_offset) % LARGE_PAGE for segment in region.segments)


def is_memfd(region: Region) -> bool:
    """Return whether the memory is a memfd of QEMU, which has no path."""
    return os.readlink(f"/proc/self/fd/{region.fd}").removesuffix(" (deleted)") == _MEMFD


async def devices(monitor: Monitor) -> list[tuple[str, str]]:
    """Return the type and name of all devices that are not part of the machine type."""
    paths = ("/machine/peripheral", "/machine/peripheral-anon")
    folders = await asyncio.gather(*(monitor.execute("qom-list", path=path) for path in paths))
    items = [(item["type"], item["name"]) for folder in folders for item in folder]
    return [(kind.removeprefix("child<").removesuffix(">"), name) for kind, name in items if kind.startswith("child<")]


async def _used_backends(monitor: Monitor) -> list[dict[str, object]]:
    """Return the memory backends that are guest memory, as reported by QMP `query-memdev`.

    If the machine has one backend for all of its memory, other backends are unused: libvirt always creates a backend,
    and the options of a domain can select another one.
    """
    backends: list[dict[str, object]] = await monitor.execute("query-memdev")
    selected = await monitor.execute("qom-get", path="/machine", property="memory-backend")
    return [one for one in backends if f"/objects/{one.get('id')}" == selected] or backends


async def _describe(monitor: Monitor, backend: dict[str, object]) -> _Backend:
    name, size = backend.get("id"), backend["size"]
    if not isinstance(name, str):
        raise UnsupportedError(f"unsupported guest memory: its backend has no id; {_ADVICE}")
    assert isinstance(size, int)
    if not backend.get("share"):
        raise UnsupportedError(f"unsupported guest memory in backend {name}: it is private; {_ADVICE}")
    properties = {item["name"] for item in await monitor.execute("qom-list", path=f"/objects/{name}")}
    if "mem-path" not in properties and "seal" in properties:
        return _Backend(name, size, _MEMFD, 0)
    if "mem-path" not in properties:
        raise UnsupportedError(
            f"unsupported guest memory in backend {name}: it is not in a file that has a path; {_ADVICE}"
        )
    path = await monitor.execute("qom-get", path=f"/objects/{name}", property="mem-path")
    offset = 0
    if "offset" in properties:  # available since QEMU 8.1
        offset = await monitor.execute("qom-get", path=f"/objects/{name}", property="offset")
    return _Backend(name, size, path, offset)


def _open_region(pid: int, backend: _Backend, mappings: Sequence[proc.Mapping]) -> Region:
    where = f"guest memory in backend {backend.name} ({backend.path})"
    segments = tuple(_segments(pid, mappings, backend))
    if not _covers(segments, backend.size):
        raise WorkloadError(
            f"cannot use {where}: it is not among the shared, writable mappings of process {pid}; {_ADVICE}"
        )
    try:
        descriptor = proc.open_mapped_file(pid, mappings[0])
    except proc.NotInMemory as elsewhere:
        raise UnsupportedError(f"cannot use {where}: {elsewhere.strerror}; {_IN_MEMORY}") from elsewhere
    except FileNotFoundError as replaced:
        raise WorkloadError(f"cannot open {where}: {replaced.strerror}; retry") from replaced
    match os.fstatvfs(descriptor).f_bsize:
        case 4096 | 2097152 as page_size:
            return Region(backend.name, backend.size, descriptor, backend.offset, page_size, segments)
        case other:
            os.close(descriptor)
            raise UnsupportedError(
                f"unsupported guest memory in backend {backend.name}: it has pages of {other} bytes; use 4 KiB or 2 MiB"
            )


def _mappings_of(pid: int, backend: _Backend, mappings: Sequence[proc.Mapping]) -> list[proc.Mapping]:
    """Return the mappings of a backend's file. Raises UnsupportedError if the mappings of several files match."""
    path = backend.path
    if path == _MEMFD:
        return _only_file(backend, [one for one in _of_memfds(mappings) if one.length == backend.size])
    seen = path.replace("/proc/self/", f"/proc/{pid}/") if path.startswith("/proc/self/") else _within(pid, path)
    try:
        status = os.stat(seen)
    except OSError:
        status = None
    if status is not None and stat.S_ISDIR(status.st_mode):
        found = [one for one in mappings if one.device == status.st_dev and _is_unlinked_file_of(backend.name, one)]
    else:
        found = [one for one in mappings if status is not None and one.identity == (status.st_dev, status.st_ino)]
        if not found:  # the file has been removed or replaced: compare the path of the mapping
            names = {os.fsencode(path), os.fsencode(f"{path} (deleted)")}
            found = [one for one in mappings if one.path in names]
    return _only_file(backend, found)


def _only_file(backend: _Backend, found: list[proc.Mapping]) -> list[proc.Mapping]:
    """Return the found mappings. Raises UnsupportedError if they belong to several files."""
    if len({one.identity for one in found}) > 1:
        raise UnsupportedError(
            f"cannot determine which of several mapped files holds guest memory in backend {backend.name} "
            f"({backend.path}); give each memory backend a separate mem-path that names a file, and restart the guest"
        )
    return found


def _of_memfds(mappings: Sequence[proc.Mapping]) -> list[proc.Mapping]:
    """Return the mappings of backends of type `memory-backend-memfd`."""
    return [one for one in mappings if one.path.removesuffix(b" (deleted)") == _MEMFD.encode()]


def _is_unlinked_file_of(backend: str, mapping: proc.Mapping) -> bool:
    """Return whether a mapped file has the name that QEMU gives to the file of a backend, which contains the id or the
    object path of the backend."""
    name = re.escape(os.fsencode(backend))
    pattern = rb"qemu_back_mem\.(?:_objects_)?" + name + rb"\.[A-Za-z0-9]{6}(?: \(deleted\))?"
    return re.fullmatch(pattern, mapping.path.rpartition(b"/")[2]) is not None


def _within(pid: int, path: str) -> str:
    """Return the path, in this process, of a file of another process, whose root and working directory may differ."""
    return f"/proc/{pid}/{'root' if Path(path).is_absolute() else 'cwd/'}{path}"


def _segments(pid: int, mappings: Sequence[proc.Mapping], backend: _Backend) -> Iterator[Segment]:
    """Yield the parts of the mappings that map the backend."""
    for mapping in mappings:
        first = max(mapping.offset, backend.offset)
        last = min(mapping.offset + mapping.length, backend.offset + backend.size)
        if first < last:
            yield Segment(
                pid=pid,
                address=mapping.address + first - mapping.offset,
                length=last - first,
                offset=first - backend.offset,
            )


def _covers(segments: Sequence[Segment], size: int) -> bool:
    """Return whether every byte of a backend is in a segment."""
    end = 0
    for segment in sorted(segments, key=lambda segment: segment.offset):
        if segment.offset > end:
            return False
        end = max(end, segment.offset + segment.length)
    return end >= size


def _check_apart(found: Sequence[tuple[_Backend, list[proc.Mapping]]]) -> None:
    """Raise UnsupportedError if two backends use the same bytes of one file."""
    places = sorted(
        (mappings[0].identity, backend.offset, backend.offset + backend.size, backend.name)
        for backend, mappings in found
        if mappings
    )
    for (file, _, end, name), (next_file, start, _, next_name) in pairwise(places):
        if file == next_file and start < end:
            raise UnsupportedError(
                f"unsupported guest memory: backends {name} and {next_name} use the same bytes of one file; give "
                "each a separate mem-path or offset, and restart the guest"
            )


async def _check_completeness(monitor: Monitor, managed: int) -> None:
    summary = await monitor.execute("query-memory-size-summary")
    if summary.get("plugged-memory", 0):
        raise UnsupportedError("unsupported guest: hotplugged memory is not managed; give all memory with -m")
    if summary["base-memory"] != managed:
        total = summary["base-memory"]
        raise UnsupportedError(
            f"unsupported guest: it has {total} bytes of memory, of which {managed} are in shared files; {_ADVICE}"
        )
