"""Parsers of /proc (proc(5)), one per file: identity and state of processes, their mappings and page faults.

All of pageferry reads /proc through this module and `smaps`. The files are read as bytes and split at newlines only:
names of processes and files may contain any byte except NUL, and Python's `splitlines` splits text at ten more
characters. The kernel escapes a newline in a file name (`\\012`); /proc/PID/stat and /proc/PID/comm contain the name of
a process unescaped.

A pid identifies a process only until the kernel reuses it. Everywhere in pageferry a process is therefore identified by
its pid and its start time, in clock ticks since boot (/proc/PID/stat field 22).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pageferry.errors import WorkloadDied
from pageferry.host import file_systems

_DEAD_STATES = frozenset("ZXx")
"""Thread states zombie and dead in /proc/PID/stat: a thread in one of these states no longer runs code."""
_KERNEL_THREAD = 0x00200000
"""PF_KTHREAD of include/linux/sched.h, in field 9 of /proc/PID/stat."""

_MAPPING = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-])([ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) ([0-9]+) *(.*)", re.DOTALL
)


class NotInMemory(OSError):
    """The file behind a mapping is not a regular file on tmpfs or hugetlbfs; `strerror` names its file system."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps."""

    address: int
    length: int
    offset: int
    """Offset of the mapping in the file, bytes."""
    device: int
    """Device of the file, as in `os.stat_result.st_dev`."""
    inode: int
    """Inode of the file; 0 if there is none."""
    access: str
    """`rwx`, with a hyphen for each access that is denied."""
    shared: bool
    path: bytes
    """Path as printed by the kernel; not an identity: a file can be named `x (deleted)`."""

    @property
    def end(self) -> int:
        """Address of the first byte after the mapping."""
        return self.address + self.length

    @property
    def writable(self) -> bool:
        """Whether the process can write to the mapping."""
        return "w" in self.access

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the file."""
        return self.device, self.inode

    @property
    def name(self) -> str:
        """Path for display, with bytes that are not UTF-8 as `\\xNN`."""
        return printable(self.path)


# -- files of /proc ----------------------------------------------------------------------------------------------------


def lines(text: bytes) -> list[bytes]:
    """Return the lines of a file in /proc, split at newlines only."""
    found = text.split(b"\n")
    return found[:-1] if found[-1] == b"" else found


def printable(text: bytes) -> str:
    """Return a name as text, with bytes that are not UTF-8 as `\\xNN`."""
    return text.decode("utf-8", "backslashreplace")


def read(pid: int, name: str) -> bytes:
    """Return the contents of a file of /proc/PID. Raises WorkloadDied if the process has exited, PermissionError if
    this user is not permitted to read the file."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"process {pid} has exited") from gone


def pids() -> list[int]:
    """Return the pids of all processes in /proc."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def boot_id() -> str:
    """Return the random id of the current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def namespace() -> str | None:
    """Return the namespaces that pids and start times refer to; None if /proc belongs to another PID namespace."""
    try:
        numbers = status(int(os.readlink("/proc/self")))[b"NSpid"]
    except FileNotFoundError:  # the file is not visible in this container
        return None
    if len(numbers) != 1:  # one pid per namespace, from that of /proc to that of this process
        return None
    return ",".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time"))


# -- processes and their threads ---------------------------------------------------------------------------------------


def start_time(pid: int) -> int | None:
    """Return the start time of process `pid`, in clock ticks since boot; None if all of its threads have exited.

    None also means that no such process exists. A process whose main thread is a zombie runs as long as another of its
    threads runs.
    """
    fields = _stat_fields(f"{pid}")
    if fields is None or (_state(fields) in _DEAD_STATES and not any(_living_threads(pid))):
        return None
    return int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Return whether the process with `pid` that started at `started` is running."""
    return start_time(pid) == started


def thread_states(pid: int) -> list[str]:
    """Return the states of a process's threads (`R`, `S`, `T`, `Z`, ...). Raises WorkloadDied if the process has
    exited.
    """
    found = (_stat_fields(f"{pid}/task/{thread}") for thread in threads(pid))
    return [_state(fields) for fields in found if fields is not None]


def _living_threads(pid: int) -> Iterator[int]:
    try:
        found = threads(pid)
    except WorkloadDied:
        return
    for thread in found:
        fields = _stat_fields(f"{pid}/task/{thread}")
        if fields is not None and _state(fields) not in _DEAD_STATES:
            yield thread


def threads(pid: int) -> tuple[int, ...]:
    """Return the thread ids of a process. Raises WorkloadDied if it has exited."""
    try:
        return tuple(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"process {pid} has exited") from gone


def inner_threads(pid: int) -> dict[int, int]:
    """Return the threads of a process: id in the PID namespace of the process -> id in the namespace of /proc
    (`NSpid`).

    Raises WorkloadDied if the process has exited.
    """
    found = {}
    for thread in threads(pid):
        try:
            numbers = status(pid, thread)[b"NSpid"]
        except WorkloadDied:  # the thread has exited since `threads` listed it
            continue
        found[int(numbers[-1])] = thread
    return found


def status(pid: int, thread: int | None = None) -> dict[bytes, list[bytes]]:
    """Return the fields of /proc/PID/status, or of the status file of one thread, by name.

    Raises WorkloadDied if the process or thread has exited.
    """
    found: dict[bytes, list[bytes]] = {}
    for line in lines(read(pid, "status" if thread is None else f"task/{thread}/status")):
        name, _, rest = line.partition(b":")
        found.setdefault(name, rest.split())
    return found


def users(pid: int) -> frozenset[int]:
    """Return the real, effective, saved and file system uids of a process. Raises WorkloadDied if it has exited."""
    return frozenset(int(number) for number in status(pid)[b"Uid"])


def parent(pid: int) -> int | None:
    """Return the pid of the parent of a process; None if the process has exited."""
    fields = _stat_fields(f"{pid}")
    return None if fields is None else int(fields[1])


def command(pid: int) -> str:
    """Return the name of a process (/proc/PID/comm), for display only: any process may take any name.

    Raises WorkloadDied.
    """
    return printable(read(pid, "comm").removesuffix(b"\n"))


def arguments(pid: int) -> list[str]:
    """Return the command line of a process (/proc/PID/cmdline), the program first. Raises WorkloadDied."""
    return [os.fsdecode(word) for word in read(pid, "cmdline").split(b"\0")[:-1]]


def kernel_thread(name: bytes, pid: int) -> bool:
    """Return whether `pid` is a kernel thread whose name begins with `name`; False for a user process of that name."""
    fields = _stat_fields(f"{pid}")
    try:
        return fields is not None and bool(int(fields[6]) & _KERNEL_THREAD) and read(pid, "comm").startswith(name)
    except WorkloadDied:
        return False


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of all present and past threads of a process, seconds. Raises WorkloadDied."""
    fields = _stat_fields(f"{pid}")
    if fields is None:
        raise WorkloadDied(f"process {pid} has exited")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_faults(pid: int, thread_ids: Iterable[int]) -> tuple[int, int]:
    """Return the numbers of minor and major page faults of these threads of a process since their start.

    Threads that have exited are not counted. Raises WorkloadDied if the process has exited.
    """
    minor = major = 0
    for thread in thread_ids:
        fields = _stat_fields(f"{pid}/task/{thread}")
        if fields is not None:
            minor += int(fields[7])
            major += int(fields[9])
    if start_time(pid) is None:
        raise WorkloadDied(f"process {pid} has exited")
    return minor, major


def _state(fields: list[bytes]) -> str:
    return fields[0].decode()


def _stat_fields(folder: str) -> list[bytes] | None:
    """Return the fields of a stat file from the third (state) on; None if it does not exist.

    The second field, the name, may contain any character, even `)`.
    """
    try:
        text = Path(f"/proc/{folder}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(b")") + 2 :].split()


# -- mappings ----------------------------------------------------------------------------------------------------------


def mappings(pid: int) -> list[Mapping]:
    """Return all mappings of a process, by address. Raises the same errors as `read`."""
    return [mapping for line in lines(read(pid, "maps")) if (mapping := parse_mapping(line)) is not None]


def file_mappings(pid: int) -> Iterator[Mapping]:
    """Yield the file-backed mappings of a process, by address. Raises the same errors as `mappings`."""
    return (mapping for mapping in mappings(pid) if mapping.inode != 0)


def parse_mapping(line: bytes) -> Mapping | None:
    """Parse a line of /proc/PID/maps, or the first line of a mapping in smaps. Return None for any other line."""
    matched = _MAPPING.fullmatch(line)
    if matched is None:
        return None
    first, last, access, shared, offset, major, minor, inode, path = matched.groups()
    return Mapping(
        address=int(first, 16),
        length=int(last, 16) - int(first, 16),
        offset=int(offset, 16),
        device=os.makedev(int(major, 16), int(minor, 16)),
        inode=int(inode),
        access=access.decode(),
        shared=shared == b"s",
        path=path,
    )


def open_mapped_file(pid: int, mapping: Mapping) -> int:
    """Open, for reading and writing, the memory file behind a shared, writable mapping; return the descriptor.

    The file is opened through a descriptor of the process (no privilege is needed for processes of the same user), or
    else through /proc/PID/map_files (requires CAP_CHECKPOINT_RESTORE). The process may change its descriptors and
    mappings at any time. Before the file is opened, it is therefore identified as the mapped one, without side effects.

    Raises NotInMemory if the file is not on tmpfs or hugetlbfs, PermissionError if neither way is permitted or if the
    mapping is private or read-only, WorkloadDied if the process has exited. Also raises other OSErrors.
    """
    if not (mapping.shared and mapping.writable):
        raise PermissionError(errno.EACCES, "the mapping of the process is private or read-only")
    for entry in _descriptors(pid):
        try:
            return _open_if_mapped(entry, mapping)
        except FileNotFoundError:  # the descriptor was closed, or refers to another file
            continue
    return _open_if_mapped(f"/proc/{pid}/map_files/{mapping.address:x}-{mapping.end:x}", mapping)


def _open_if_mapped(entry: str, mapping: Mapping) -> int:
    """Open the file behind a link of /proc/PID for reading and writing.

    Raises FileNotFoundError if the file is not that of the mapping. Also raises NotInMemory and other OSErrors.
    """
    # O_PATH has no side effects on a device, terminal or FIFO.
    reference = os.open(entry, os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(reference)
        if (found.st_dev, found.st_ino) != mapping.identity:
            raise FileNotFoundError(errno.ENOENT, "the process has replaced the file")
        if not stat.S_ISREG(found.st_mode):
            raise NotInMemory(errno.EINVAL, "it is not a regular file")
        if not file_systems.in_memory(reference):
            raise NotInMemory(errno.EINVAL, f"it is on {file_systems.name_of(file_systems.file_system(reference))}")
        return os.open(f"/proc/self/fd/{reference}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(reference)


def _descriptors(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]
    except PermissionError:
        return []
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"process {pid} has exited") from gone


def meminfo() -> dict[str, int]:
    """Return the fields of /proc/meminfo that have a unit, in bytes, by the kernel's names."""
    found = {}
    for line in lines(Path("/proc/meminfo").read_bytes()):
        name, _, rest = line.partition(b":")
        if rest.endswith(b" kB"):
            found[name.decode()] = int(rest.split()[0]) << 10
    return found


def available() -> float:
    """Return the fraction of this host's memory that is available without swapping, 0 to 1."""
    counts = meminfo()
    return counts["MemAvailable"] / counts["MemTotal"]
