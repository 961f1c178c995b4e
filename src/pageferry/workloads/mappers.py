"""Which processes map an arena: the program itself and those that descend from it."""

from __future__ import annotations

import os
from collections import defaultdict

from pageferry.errors import WorkloadDied
from pageferry.host import proc
from pageferry.workloads.base import Segment


def descendants(pid: int) -> list[int]:
    """Living children of a process, their children and so on (proc(5), /proc/PID/stat field 4)."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for child in proc.pids():
        if (parent := proc.parent(child)) is not None:
            children[parent].append(child)
    found = [pid]
    for ancestor in found:
        found.extend(children[ancestor])
    return found[1:]


def inherited_segments(file: int, length: int) -> list[Segment]:
    """Where processes that descend from this one map the first `length` bytes of a file, shared and writable."""
    if not _has_children():
        return []
    status = os.fstat(file)
    segments = []
    for pid in descendants(os.getpid()):
        try:
            mappings = list(proc.file_mappings(pid))
        except (WorkloadDied, PermissionError):  # ended meanwhile, or became another user's
            continue
        for mapping in mappings:
            ours = (mapping.device, mapping.inode) == (status.st_dev, status.st_ino)
            if ours and mapping.shared and mapping.writable and mapping.offset < length:
                shown = min(mapping.length, length - mapping.offset)
                segments.append(Segment(pid, mapping.address, shown, mapping.offset))
    return segments


def _has_children() -> bool:
    """Whether this process has any: to look for them is slow where another thread of the program keeps the GIL busy."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def threads(pid: int) -> list[int]:
    """The thread ids of a process; none when it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []
