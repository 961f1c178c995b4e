"""Processes that can write to a workload's memory: found in /proc, and traced or refused.

A process can write to memory through a shared, writable mapping. A process that has only a descriptor open for writing
can write by system calls, or map the memory at any time. No trace reports such writes, so a trace is refused as long as
there is such a process. The scan cannot find a descriptor in flight between two processes, a descriptor registered with
io_uring, or a process outside the PID namespace of this process. See docs/guide/python.md.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pageferry import _engine
from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host import proc
from pageferry.memory.regions import Region, Segment

_CONFIRM = 0.02
"""Seconds between two scans, if the first one finds a process that may be about to execute another program."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Ways in which other processes may have received the memory of an arena."""

    handed_out: bool = False
    """Whether the program has obtained the descriptor (`fileno`), and so may have passed it to any process."""
    observers: tuple[int, ...] = ()
    """Processes of pageferry that have received the memory, and do not write to it."""


@dataclass(frozen=True, slots=True)
class Found:
    """Processes that can write to one file."""

    segments: tuple[Segment, ...]
    """Shared, writable mappings of the program and of other processes, except those of pageferry."""
    holders: tuple[int, ...]
    """Processes that have the file open for writing and do not map it."""
    unreadable: tuple[int, ...]
    """Processes that this user is not permitted to inspect."""


def find(file: int, length: int, sharing: Sharing) -> Found:
    """Scan /proc for processes that can write to the first `length` bytes of a file.

    Mappings that pageferry has created in this process are excluded. If another process shares the file, /proc is
    scanned a second time: between fork and exec a child has all mappings and descriptors of its parent.
    """
    found = _scan(file, length, sharing)
    if {segment.pid for segment in found.segments} - {os.getpid()} or found.holders:
        time.sleep(_CONFIRM)
        again = _scan(file, length, sharing)
        holders = tuple(pid for pid in again.holders if pid in found.holders)
        return replace(again, holders=holders)
    return found


def check(name: str, found: Found, sharing: Sharing) -> None:
    """Raise WorkloadError for processes that cannot be traced, UnsupportedError if processes cannot be inspected."""
    if found.holders:
        raise WorkloadError(
            f"cannot trace {name}: {_processes(found.holders)} can write to the memory through a descriptor, without "
            "a mapping, and such writes are not traced; map the memory in that process, or close the descriptor"
        )
    hidden = set(found.unreadable) - {1}  # a program does not pass its memory to init
    if sharing.handed_out and (hidden or not os.path.exists("/proc/1")):
        raise UnsupportedError(
            f"cannot trace {name}: its descriptor was handed out by fileno(), and this user cannot inspect all "
            "processes that may have it; run as root or with CAP_SYS_PTRACE, or share the memory by fork instead"
        )


def check_again(name: str, traced: Iterable[Segment], found: Found) -> None:
    """Raise WorkloadError for a process that has mapped the memory since the traces were installed."""
    known = list(traced)
    new = sorted({segment.pid for segment in found.segments if not any(_shows(one, segment) for one in known)})
    if new:
        raise WorkloadError(
            f"cannot trace {name}: {_processes(new)} mapped the memory during the operation, so that writes may be "
            "missing from the trace; retry now that the memory is mapped"
        )


def refuse_strangers(name: str, regions: Sequence[Region]) -> None:
    """Raise WorkloadError if a process that belongs neither to the guest nor to pageferry maps the guest's memory for
    writing.

    A pause of the guest does not stop such a process. Processes that cannot be inspected belong to other users. They
    cannot open the file for writing unless its permissions allow it.
    """
    ids, own = [], set()
    for region in regions:
        status = os.fstat(region.fd)
        pid, address = region.segments[0].pid, region.segments[0].address
        own |= {segment.pid for segment in region.segments}
        mapped = next((line.device for line in proc.file_mappings(pid) if line.address <= address < line.end), None)
        ids.append((status.st_dev, status.st_ino, status.st_dev if mapped is None else mapped))

    mappings = _engine.scan_mappers(ids).mappings
    strangers = {one.pid for one in mappings if one.writable and not one.engine} - own
    if strangers:
        raise WorkloadError(
            f"cannot trace {name}: {_processes(sorted(strangers))} maps the memory of the guest for writing, "
            "and a pause of the guest does not stop that process; end it first"
        )


def refuse_in_use(name: str, path: str, offset: int, length: int) -> None:
    """Raise WorkloadError if a process, except those of pageferry, maps a part of this range of a file for writing.

    QEMU would share the memory of that process with the guest `name`. A path that is not a file is accepted: QEMU
    creates a file for it.
    """
    try:
        status = os.stat(path)
    except OSError:
        return
    if not stat.S_ISREG(status.st_mode):
        return

    users = {
        one.pid
        for one in _engine.scan_mappers([(status.st_dev, status.st_ino, status.st_dev)]).mappings
        if one.writable and not one.engine and one.offset < offset + length and offset < one.offset + one.length
    }
    if users:
        raise WorkloadError(
            f"cannot start {name}: {_processes(sorted(users))} maps {path} for writing, and would share that "
            "memory with the guest; give the guest another mem-path"
        )


def threads(pid: int) -> list[int]:
    """Return the thread ids of a process; none if it has exited."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _scan(file: int, length: int, sharing: Sharing) -> Found:
    status = os.fstat(file)
    scanned = _engine.scan_mappers([(status.st_dev, status.st_ino, status.st_dev)])
    mappings = scanned.mappings
    known = {one.pid for one in mappings} | {os.getpid(), *sharing.observers}
    segments = [
        Segment(one.pid, one.address, min(one.length, length - one.offset), one.offset)
        for one in mappings
        if one.writable
        and one.offset < length
        and one.pid not in sharing.observers
        and not _is_ours(one.pid, one.address)
    ]
    holders = sorted(set(scanned.writers) - known)
    return Found(tuple(segments), tuple(holders), tuple(scanned.unreadable))


def _is_ours(pid: int, address: int) -> bool:
    """Return whether pageferry has created the mapping at this address: the arena itself, or a view of its memory."""
    if pid != os.getpid():
        return False
    return any(start <= address < start + length for start, length in _engine.own_mappings())


def _shows(known: Segment, found: Segment) -> bool:
    """Return whether the mapping `found` is `known`, or a part of it."""
    within = known.address <= found.address and found.address + found.length <= known.address + known.length
    return known.pid == found.pid and within


def _processes(pids: Sequence[int]) -> str:
    return ", ".join(f"process {pid} ({_name(pid)})" for pid in pids)


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().decode(errors="replace").strip()
    except OSError:
        return "exited"
