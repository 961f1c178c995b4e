"""Direct I/O of QEMU guests: detects disks that use it, waits for their requests, and refuses devices that pin memory.

The open files of QEMU show whether it uses direct I/O. This is assumed of files opened with O_DIRECT, of block devices
(their requests may be SG_IO), and of files on file systems that may bypass the page cache. QEMU's `stop` waits for all
requests (`bdrv_drain_all`), and cannot be cancelled. Therefore, the requests are polled first: if one does not
complete, an error names the disk, and the guest keeps running.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.host.file_systems import file_system
from pageferry.workloads.direct_io import DRAIN_TIMEOUT

_SETTLE = 0.02
"""Interval between two polls of the requests in flight, seconds."""

_PAGE_CACHE = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # xfs
        0x9123683E,  # btrfs
        0xF2F52010,  # f2fs
        0x01021994,  # tmpfs
        0x858458F6,  # ramfs
        0x958458F6,  # hugetlbfs
        0x4D44,  # vfat
        0x9660,  # isofs
        0x73717368,  # squashfs
        0x6969,  # nfs
    }
)
"""File systems (statfs f_type) whose buffered reads copy from the page cache. For other file systems, this is not
known."""

_PINNED_FOR_GOOD = ("/dev/vfio/", "/dev/vhost-vdpa", "/dev/vhost-scsi", "/dev/infiniband/", "/dev/iommu")
"""Path prefixes of devices that write to guest memory at any time, through permanently pinned pages."""

_NO_FILES = ("socket:", "pipe:", "anon_inode:")
"""Prefixes in /proc/PID/fd of descriptors without a path, which are not disks."""

_PASSTHROUGH = ("/dev/sg", "/dev/bsg/", "/dev/ng")
"""Prefixes of character devices whose requests pin the memory of the transfer."""
_IO_CALLS = frozenset({"0", "1", "17", "18", "19", "20", "295", "296", "327", "328", "74", "75", "16"})
"""Numbers of the system calls read, write, pread, pwrite, readv, writev, preadv, pwritev, preadv2, pwritev2, fsync,
fdatasync, ioctl (x86-64)."""

_SWITCHES = (b"voluntary_ctxt_switches:", b"nonvoluntary_ctxt_switches:")


def direct_files(pid: int, name: str) -> dict[int, str]:
    """Return the files that a QEMU process may read without the page cache, as paths by descriptor.

    Raises the same errors as `refuse_pinning`.
    """
    found = {}
    for number, path in _unpinned(pid, name):
        if path.startswith(_NO_FILES):
            continue
        with suppress(FileNotFoundError, ProcessLookupError):  # closed since it was listed
            if _reads_directly(pid, number, path):
                found[number] = path
    return found


def refuse_pinning(pid: int, name: str) -> None:
    """Raise UnsupportedError if a device keeps guest memory pinned. Also raises WorkloadDied, WorkloadError."""
    for _ in _unpinned(pid, name):
        pass


def _unpinned(pid: int, name: str) -> Iterator[tuple[int, str]]:
    """Yield the open files of a process, as descriptor and path. Raises the same errors as `refuse_pinning`."""
    for number, path in _open_files(pid):
        if path.startswith(_PINNED_FOR_GOOD):
            raise UnsupportedError(
                f"cannot trace the memory of {name}: the device {path}, which QEMU has open, writes without "
                "a trace; remove the device first"
            )
        yield number, path


async def await_requests(pid: int, files: dict[int, str], name: str, timeout: float = DRAIN_TIMEOUT) -> None:
    """Wait until no request to these files stays in flight between two polls, while the guest runs.

    Only requests of QEMU's threads are found (`aio=threads`). Raises WorkloadError, naming the file, if a request takes
    longer than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    before = _requests(pid, files)
    while before:
        await asyncio.sleep(_SETTLE)
        now = _requests(pid, files)
        if not (lasting := before & now):
            return
        if time.monotonic() > deadline:
            path = files[next(iter(lasting))[2]]
            raise WorkloadError(slow(name, path, timeout))
        before = lasting


def slow(name: str, path: str, timeout: float) -> str:
    """Return the error message for requests to `path` that have not completed within `timeout` seconds."""
    return (
        f"cannot copy the memory of {name}: a request to {path} has been in flight for more than {timeout:g} s; retry "
        f"when the disk responds"
    )


def _open_files(pid: int) -> Iterator[tuple[int, str]]:
    folder = Path(f"/proc/{pid}/fd")
    try:
        numbers = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError) as ended:
        raise WorkloadDied(f"process {pid} has exited") from ended
    except PermissionError as denied:
        raise WorkloadError(f"cannot list the files of process {pid}: permission denied; run as root") from denied
    for number in numbers:
        with suppress(FileNotFoundError, ProcessLookupError):
            yield int(number), os.readlink(folder / number)


def _reads_directly(pid: int, number: int, path: str) -> bool:
    mode = os.stat(f"/proc/{pid}/fd/{number}").st_mode
    if stat.S_ISCHR(mode):
        return path.startswith(_PASSTHROUGH)
    if not stat.S_ISREG(mode):
        return stat.S_ISBLK(mode)
    flags = _flags(pid, number)
    if flags & os.O_ACCMODE == os.O_WRONLY:
        return False
    return bool(flags & os.O_DIRECT) or _file_system_of(f"/proc/{pid}/fd/{number}") not in _PAGE_CACHE


def _flags(pid: int, number: int) -> int:
    text = Path(f"/proc/{pid}/fdinfo/{number}").read_bytes()
    return next(int(line.split()[1], 8) for line in text.split(b"\n") if line.startswith(b"flags:"))


def _file_system_of(path: str) -> int | None:
    """Return the f_type of statfs(2); None if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return file_system(descriptor)
    finally:
        os.close(descriptor)


def _requests(pid: int, files: dict[int, str]) -> set[tuple[int, int, int]]:
    """Return the blocked I/O calls on these files, each as (thread, number of its context switches, descriptor)."""
    found = set()
    for thread in proc.threads(pid):
        folder = Path(f"/proc/{pid}/task/{thread}")
        with suppress(OSError):  # the thread has exited, or cannot be inspected
            words = (folder / "syscall").read_text().split()
            if len(words) > 1 and words[0] in _IO_CALLS and (number := int(words[1], 16)) in files:
                found.add((thread, _switches(folder), number))
    return found


def _switches(folder: Path) -> int:
    lines = (folder / "status").read_bytes().split(b"\n")
    return sum(int(line.split()[1]) for line in lines if line.startswith(_SWITCHES))
