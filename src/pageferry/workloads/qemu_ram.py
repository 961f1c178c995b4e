"""Where the memory of a running QEMU guest is: its backends, the files behind them, and where QEMU maps those.

QMP: `query-memdev` names the backends, `qom-get` their files; /proc/PID/maps says where the files are mapped.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host import proc
from pageferry.workloads.base import LARGE_PAGE, Region, Segment
from pageferry.workloads.qmp import Monitor

_ADVICE = (
    "start QEMU by `pageferry run`, or with -object memory-backend-file,id=ram0,size=SIZE,share=on,align=2M,"
    "mem-path=FILE -machine memory-backend=ram0, FILE being on a tmpfs mounted with huge=always"
)


async def open_regions(monitor: Monitor, pid: int) -> tuple[Region, ...]:
    """The guest's memory, with an open file each; the caller closes them.

    Raises UnsupportedError where some of it is not in shared files, PermissionError where we may not open them.
    """
    regions: list[Region] = []
    try:
        for backend in await monitor.execute("query-memdev"):
            regions.append(await _open_region(monitor, pid, backend))  # noqa: PERF401  # those open are closed below
        await _check_completeness(monitor, sum(region.length for region in regions))
    except BaseException:
        for region in regions:
            os.close(region.fd)
        raise
    return tuple(regions)


def misaligned(region: Region) -> bool:
    """Whether large pages of the file cannot be mapped as such where QEMU maps it."""
    return any((segment.address - segment.offset - region.file_offset) % LARGE_PAGE for segment in region.segments)


async def devices(monitor: Monitor) -> list[str]:
    """The types of all devices that are not part of the machine itself."""
    folders = [await monitor.execute("qom-list", path=f"/machine/{name}") for name in ("peripheral", "peripheral-anon")]
    types = [item["type"] for folder in folders for item in folder]
    return [kind.removeprefix("child<").removesuffix(">") for kind in types if kind.startswith("child<")]


async def _open_region(monitor: Monitor, pid: int, backend: dict[str, object]) -> Region:
    name, size = backend["id"], backend["size"]
    assert isinstance(name, str)
    assert isinstance(size, int)
    if not backend.get("share"):
        raise UnsupportedError(f"guest memory in backend {name} is private: {_ADVICE}")
    path, offset = await _file_of(monitor, name)
    mappings = [mapping for mapping in _mappings_of(pid, path) if mapping.shared]
    segments = tuple(_segments(pid, mappings, offset, size))
    if sum(segment.length for segment in segments) < size:
        raise WorkloadError(f"guest memory in backend {name} ({path}) is not found among the mappings of process {pid}")
    descriptor = proc.open_mapped_file(pid, mappings[0])
    match os.fstatvfs(descriptor).f_bsize:
        case 4096 | 2097152 as page_size:
            return Region(name, size, descriptor, offset, page_size, segments)
        case other:
            os.close(descriptor)
            raise UnsupportedError(f"guest memory in backend {name} has pages of {other} bytes: use 4 KiB or 2 MiB")


async def _file_of(monitor: Monitor, backend: str) -> tuple[str, int]:
    """Path of a backend's file, as it was given to QEMU, and where in it the memory starts."""
    properties = {item["name"] for item in await monitor.execute("qom-list", path=f"/objects/{backend}")}
    if "mem-path" not in properties:
        raise UnsupportedError(f"guest memory in backend {backend} is not in a file that has a path: {_ADVICE}")
    path = await monitor.execute("qom-get", path=f"/objects/{backend}", property="mem-path")
    offset = 0
    if "offset" in properties:
        offset = await monitor.execute("qom-get", path=f"/objects/{backend}", property="offset")
    return path, offset


def _mappings_of(pid: int, path: str) -> list[proc.Mapping]:
    """The mappings of the file that process `pid` knew, when it opened it, by `path`; a folder stands for QEMU's
    nameless files in it.
    """
    seen = path.replace("/proc/self/", f"/proc/{pid}/") if path.startswith("/proc/self/") else _within(pid, path)
    try:
        found = os.stat(seen)
    except OSError:
        found = None
    if found is not None and stat.S_ISDIR(found.st_mode):
        beginning = os.fsencode(path.rstrip("/") + "/qemu_back_mem.")
        return [mapping for mapping in proc.file_mappings(pid) if mapping.path.startswith(beginning)]
    identity = None if found is None else (found.st_dev, found.st_ino)
    paths = {os.fsencode(path), os.fsencode(f"{path} (deleted)")}
    # Some file systems show another device in maps than in stat: there the path decides.
    return [
        mapping
        for mapping in proc.file_mappings(pid)
        if (mapping.device, mapping.inode) == identity or mapping.path in paths
    ]


def _within(pid: int, path: str) -> str:
    """A path of another process, as we can open it: its root and working folder may be others."""
    return f"/proc/{pid}/{'root' if Path(path).is_absolute() else 'cwd/'}{path}"


def _segments(pid: int, mappings: list[proc.Mapping], offset: int, size: int) -> Iterator[Segment]:
    """The parts of the mappings that show the region, which lies at `offset` of the file."""
    for mapping in mappings:
        first = max(mapping.offset, offset)
        last = min(mapping.offset + mapping.length, offset + size)
        if first < last:
            yield Segment(
                pid=pid,
                address=mapping.address + first - mapping.offset,
                length=last - first,
                offset=first - offset,
            )


async def _check_completeness(monitor: Monitor, managed: int) -> None:
    summary = await monitor.execute("query-memory-size-summary")
    if summary.get("plugged-memory", 0):
        raise UnsupportedError("the guest has hotplugged memory, which is not managed: give all of it with -m")
    if summary["base-memory"] != managed:
        total = summary["base-memory"]
        raise UnsupportedError(f"the guest has {total} bytes of memory, {managed} of them in shared files: {_ADVICE}")
