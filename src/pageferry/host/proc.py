"""Parsers of /proc (proc(5)), one for each file: identity and state of processes, what they map, their faults.

All users of /proc come through this module and `smaps`. The files are read as bytes and split at newlines only: names
of processes and files hold any byte but NUL, and Python's `splitlines` splits text at ten more characters. The kernel
escapes a newline in a file's name (`\\012`); /proc/PID/stat and /proc/PID/comm show the name of a process as it is.

A pid alone names a process only until it is reused. Everywhere in pageferry a process is a pid together with the time
it started, in clock ticks since boot (/proc/PID/stat field 22).
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
"""States zombie and dead in /proc/PID/stat: such a thread no longer runs code."""
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
        """First byte after the mapping."""
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


# -- files -------------------------------------------------------------------------------------------------------------


def lines(text: bytes) -> list[bytes]:
    """Return the lines of a file in /proc, split at newlines only."""
    found = text.split(b"\n")
    return found[:-1] if found[-1] == b"" else found


def printable(text: bytes) -> str:
    """Return a name as text, with bytes that are not UTF-8 as `\\xNN`."""
    return text.decode("utf-8", "backslashreplace")


def read(pid: int, name: str) -> bytes:
    """Return the contents of a file of /proc/PID. Raises WorkloadDied if the process has exited, PermissionError."""
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
    """The namespaces that give pids and start times their meaning; None where /proc is of another than ours."""
    try:
        numbers = status(int(os.readlink("/proc/self")))[b"NSpid"]
    except FileNotFoundError:  # not visible there
        return None
    if len(numbers) != 1:  # the number in the namespace of /proc comes first, that in ours last
        return None
    return ",".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time"))


# -- processes and their threads ---------------------------------------------------------------------------------------


def start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None when there is none, or all its threads have exited.

    A process whose main thread has exited and is a zombie lives as long as another of its threads.
    """
    fields = _stat_fields(f"{pid}")
    if fields is None or (_state(fields) in _DEAD_STATES and not any(_living_threads(pid))):
        return None
    return int(fields[19])


def is_alive(pid: int, started: int) -> bool:
    """Return whether the process with `pid` that started at `started` is running."""
    return start_time(pid) == started


def thread_states(pid: int) -> list[str]:
    """The states of a process's threads (`R`, `S`, `T`, `Z`, ...). Raises WorkloadDied if it has exited."""
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
    """The thread ids of a process. Raises WorkloadDied if it has exited."""
    try:
        return tuple(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError) as gone:
        raise WorkloadDied(f"process {pid} has exited") from gone


def inner_threads(pid: int) -> dict[int, int]:
    """The threads of a process: id in the PID namespace that the process itself is in -> id in ours (`NSpid`).

    Raises WorkloadDied if it has exited.
    """
    found = {}
    for thread in threads(pid):
        try:
            numbers = status(pid, thread)[b"NSpid"]
        except WorkloadDied:  # the thread has exited meanwhile
            continue
        found[int(numbers[-1])] = thread
    return found


def status(pid: int, thread: int | None = None) -> dict[bytes, list[bytes]]:
    """The fields of /proc/PID/status, or of one thread's, by name. Raises WorkloadDied if it has exited."""
    found: dict[bytes, list[bytes]] = {}
    for line in lines(read(pid, "status" if thread is None else f"task/{thread}/status")):
        name, _, rest = line.partition(b":")
        found.setdefault(name, rest.split())
    return found


def users(pid: int) -> frozenset[int]:
    """Real, effective, saved and file system uid of a process. Raises WorkloadDied if it has exited."""
    return frozenset(int(number) for number in status(pid)[b"Uid"])


def parent(pid: int) -> int | None:
    """Return the pid of the parent of a process; None if the process has exited."""
    fields = _stat_fields(f"{pid}")
    return None if fields is None else int(fields[1])


def command(pid: int) -> str:
    """Name of a process (/proc/PID/comm), for display: any process may take any name. Raises WorkloadDied."""
    return printable(read(pid, "comm").removesuffix(b"\n"))


def kernel_thread(name: bytes, pid: int) -> bool:
    """Whether `pid` is a kernel thread with a name that begins with `name`; a process with such a name is not."""
    fields = _stat_fields(f"{pid}")
    try:
        return fields is not None and bool(int(fields[6]) & _KERNEL_THREAD) and read(pid, "comm").startswith(name)
    except WorkloadDied:
        return False


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads that a process has had. Raises WorkloadDied if it has exited."""
    fields = _stat_fields(f"{pid}")
    if fields is None:
        raise WorkloadDied(f"process {pid} has exited")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_faults(pid: int, thread_ids: Iterable[int]) -> tuple[int, int]:
    """Minor and major page faults that these threads of a process have taken since they started.

    A thread that has ended counts no more. Raises WorkloadDied if the process has exited.
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
    """The fields of a stat file from the third (state) on; the second, the name, may hold anything, even `)`."""
    try:
        text = Path(f"/proc/{folder}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(b")") + 2 :].split()


# -- mappings ----------------------------------------------------------------------------------------------------------


def mappings(pid: int) -> list[Mapping]:
    """All mappings of a process, by address. Raises WorkloadDied if it has exited, PermissionError."""
    return [mapping for line in lines(read(pid, "maps")) if (mapping := parse_mapping(line)) is not None]


def file_mappings(pid: int) -> Iterator[Mapping]:
    """The file-backed mappings of a process, by address. Raises as `mappings`."""
    return (mapping for mapping in mappings(pid) if mapping.inode != 0)


def parse_mapping(line: bytes) -> Mapping | None:
    """A line of /proc/PID/maps, or the first line of a mapping in smaps; None for another line."""
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
    """A descriptor, open for reading and writing, of the file in memory behind a shared, writable mapping.

    By a descriptor that the process has of it (needs no privilege for our own processes), else by /proc/PID/map_files
    (needs CAP_CHECKPOINT_RESTORE). The process may change its descriptors and mappings at any time: what is opened has
    been found before to be the file that is mapped, and opening is the only step with effects. Raises NotInMemory;
    PermissionError where neither way is allowed, or the mapping is private or read-only; other OSErrors; WorkloadDied.
    """
    if not (mapping.shared and mapping.writable):
        raise PermissionError(errno.EACCES, "the process cannot write to it through its mapping")
    for entry in _descriptors(pid):
        try:
            return _open_if_mapped(entry, mapping)
        except FileNotFoundError:  # another file, or closed meanwhile
            continue
    return _open_if_mapped(f"/proc/{pid}/map_files/{mapping.address:x}-{mapping.end:x}", mapping)


def _open_if_mapped(entry: str, mapping: Mapping) -> int:
    """Open the file that a link of /proc/PID refers to for reading and writing.

    Raises FileNotFoundError where it is not the file of the mapping, NotInMemory, other OSErrors.
    """
    # O_PATH opens nothing: a device, terminal or FIFO does not notice.
    reference = os.open(entry, os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(reference)
        if (found.st_dev, found.st_ino) != mapping.identity:
            raise FileNotFoundError(errno.ENOENT, "the process has replaced it")
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
    """Return sizes in bytes by the kernel's names; counts without a unit are omitted."""
    found = {}
    for line in lines(Path("/proc/meminfo").read_bytes()):
        name, _, rest = line.partition(b":")
        if rest.endswith(b" kB"):
            found[name.decode()] = int(rest.split()[0]) << 10
    return found


def available() -> float:
    """Return the fraction of the memory that is available without swapping."""
    counts = meminfo()
    return counts["MemAvailable"] / counts["MemTotal"]
