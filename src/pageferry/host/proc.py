"""What /proc says about a process: whether it still is the one we mean, what it maps, and the faults it has taken.

A pid alone names a process only until it is reused. Everywhere in pageferry a process is a pid together with the time
it started, in clock ticks since boot (proc(5), /proc/PID/stat field 22).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pageferry.errors import WorkloadDied

_DEAD_STATES = frozenset("ZXx")
"""Zombie and dead, in /proc/PID/stat: such a process runs no code any more, whoever has yet to wait for it."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps that is backed by a file."""

    address: int
    length: int
    offset: int
    """Where in the file the mapping starts, bytes."""
    device: int
    """As in `os.stat_result.st_dev`."""
    inode: int
    shared: bool
    writable: bool
    path: str
    """As the kernel prints it: ` (deleted)` at the end where the file has no name any more."""

    @property
    def end(self) -> int:
        """First byte after the mapping."""
        return self.address + self.length


def start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None when there is none, or it is a zombie."""
    fields = _stat_fields(Path(f"/proc/{pid}/stat"))
    return None if fields is None or fields[0] in _DEAD_STATES else int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Whether the process that had `pid` and started at `started` still runs."""
    return start_time(pid) == started


def file_mappings(pid: int) -> Iterator[Mapping]:
    """The file-backed mappings of a process, by address. Raises WorkloadDied when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"process {pid} is gone") from gone
    for mapping in map(parse_mapping, lines):
        if mapping.inode != 0:
            yield mapping


def parse_mapping(line: str) -> Mapping:
    """A line of /proc/PID/maps, or the first line of a mapping in smaps."""
    span, permissions, offset, device, inode, *path = line.split(maxsplit=5)
    first, last = (int(part, 16) for part in span.split("-"))
    major, minor = (int(part, 16) for part in device.split(":"))
    return Mapping(
        address=first,
        length=last - first,
        offset=int(offset, 16),
        device=os.makedev(major, minor),
        inode=int(inode),
        shared=permissions[3] == "s",
        writable=permissions[1] == "w",
        path=path[0] if path else "",
    )


def open_mapped_file(pid: int, mapping: Mapping) -> int:
    """A descriptor, open for reading and writing, of the file behind a mapping, even where it has no name any more.

    By the process's own descriptors where one is left open (needs no privilege for our own processes), else by
    /proc/PID/map_files (needs CAP_CHECKPOINT_RESTORE). Raises PermissionError when neither is allowed.
    """
    identity = (mapping.device, mapping.inode)
    for entry in _descriptors(pid):
        try:
            found = os.stat(entry)
        except OSError:  # closed meanwhile
            continue
        if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == identity:
            return os.open(entry, os.O_RDWR | os.O_CLOEXEC)
    return os.open(f"/proc/{pid}/map_files/{mapping.address:x}-{mapping.end:x}", os.O_RDWR | os.O_CLOEXEC)


def threads(pid: int) -> tuple[int, ...]:
    """The thread ids of a process. Raises WorkloadDied when it is gone."""
    try:
        return tuple(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"process {pid} is gone") from gone


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads that a process has had. Raises WorkloadDied when it is gone."""
    fields = _stat_fields(Path(f"/proc/{pid}/stat"))
    if fields is None:
        raise WorkloadDied(f"process {pid} is gone")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_group(thread: int) -> int:
    """The pid of the process that a thread is of. Raises WorkloadDied when there is no such thread."""
    try:
        status = Path(f"/proc/{thread}/status").read_text()
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"there is no thread {thread}, or it is in another PID namespace") from gone
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("Tgid:")))


def thread_faults(pid: int, thread_ids: Iterable[int]) -> tuple[int, int]:
    """Minor and major page faults that these threads of a process have taken since they started.

    A thread that has ended counts no more. Raises WorkloadDied when the process is gone.
    """
    minor = major = 0
    for thread in thread_ids:
        fields = _stat_fields(Path(f"/proc/{pid}/task/{thread}/stat"))
        if fields is not None:
            minor += int(fields[7])
            major += int(fields[9])
    if start_time(pid) is None:
        raise WorkloadDied(f"process {pid} is gone")
    return minor, major


def _descriptors(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]
    except PermissionError:
        return []
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"process {pid} is gone") from gone


def _stat_fields(path: Path) -> list[str] | None:
    """The fields of a stat file from the third (state) on; the second, the name, may hold anything, even spaces."""
    try:
        text = path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()
