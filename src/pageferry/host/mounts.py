"""Files for guest memory: on a tmpfs of our own that gives large pages at first touch, on hugetlbfs, or on /dev/shm.

The file never has a name (O_TMPFILE): a QEMU gets it as an open descriptor, so that whatever dies, and when, the
memory goes with the last process that has it open. The mounts are made when first needed and taken away with the last
workload.

Kernel: `huge=always` of tmpfs(5) puts large pages into shared memory whatever `shmem_enabled` says, except for `deny`.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from pageferry.errors import UnsupportedError
from pageferry.host.registry import Registry

LARGE_PAGE = 2 << 20

_RAM = ".ram"
_HUGETLB = ".hugetlb"
_FALLBACK = Path("/dev/shm")
_HUGE_PAGE_COUNTS = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class RamFile:
    """A nameless file for guest memory, as long as it was asked to be, all holes."""

    fd: int
    """Open for reading and writing; the caller closes it."""
    page_size: int
    """4096, or 2 MiB on hugetlbfs."""
    warning: str | None
    """Why large pages are off, and what to do; None when they are on."""

    @property
    def inherited_path(self) -> str:
        """What a child process that inherits the descriptor opens to get the file."""
        return f"/proc/self/fd/{self.fd}"


def create_ram_file(registry: Registry, size: int, *, hugetlb: bool = False) -> RamFile:
    """A file for `size` bytes of guest memory. Nothing is allocated but, with `hugetlb`, reserved at mapping time.

    Raises UnsupportedError where `hugetlb` is asked for and not permitted, or not enough pages are free; where the file
    system cannot ever hold `size`. Without `hugetlb` it falls back to /dev/shm, with a warning.
    """
    with registry.locked():
        return _hugetlb_file(registry.path / _HUGETLB, size) if hugetlb else _tmpfs_file(registry.path / _RAM, size)


def unmount_unused(registry: Registry) -> None:
    """Take away the mounts that no file is open on any more; those in use stay."""
    with registry.locked():
        for folder in (registry.path / _RAM, registry.path / _HUGETLB):
            if folder.is_mount() and _libc.umount2(os.fsencode(folder), 0) == 0:
                folder.rmdir()


def _tmpfs_file(mount_point: Path, size: int) -> RamFile:
    warning = None
    try:
        folder = _mounted(mount_point, "tmpfs", "huge=always,mode=0700,size=100%")
    except OSError as refused:
        folder = _FALLBACK
        warning = (
            f"large pages are off: a tmpfs with huge=always cannot be mounted ({refused.strerror}); guest memory is on "
            f"{folder}. Run pageferry as root"
        )
    if warning is None and _shmem_denied():
        warning = f"large pages are off: {_SHMEM_ENABLED} says deny; write `never` to it, which leaves the choice to us"
    total = os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize
    if total < size:
        raise UnsupportedError(
            f"{size} bytes of guest memory do not fit on {folder} ({total} bytes): remount it larger"
        )
    return RamFile(_nameless(folder, size), 4096, warning)


def _hugetlb_file(folder: Path, size: int) -> RamFile:
    if size % LARGE_PAGE:
        raise UnsupportedError(f"--hugetlb needs guest memory in multiples of 2 MiB, not {size} bytes: change -m")
    needed, available = size // LARGE_PAGE, _huge_pages_available()
    if available < needed:
        raise UnsupportedError(
            f"--hugetlb needs {needed} free pages of 2 MiB, there are {available}: "
            f"add {needed - available} to /proc/sys/vm/nr_hugepages"
        )
    try:
        _mounted(folder, "hugetlbfs", "pagesize=2M,mode=0700")
    except OSError as refused:
        raise UnsupportedError(
            f"hugetlbfs cannot be mounted at {folder} ({refused.strerror}): run as root"
        ) from refused
    return RamFile(_nameless(folder, size), LARGE_PAGE, None)


def _huge_pages_available() -> int:
    """Free pages that nobody has reserved, and those the kernel may still add as surplus."""
    if not _HUGE_PAGE_COUNTS.is_dir():
        return 0

    def count(name: str) -> int:
        return int((_HUGE_PAGE_COUNTS / name).read_text())

    surplus = count("nr_overcommit_hugepages") - count("surplus_hugepages")
    return count("free_hugepages") - count("resv_hugepages") + max(surplus, 0)


def _mounted(folder: Path, kind: str, options: str) -> Path:
    """The folder, with a file system of that kind mounted there now or before. Raises OSError where that is refused."""
    if not folder.is_mount():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        if _libc.mount(b"pageferry", os.fsencode(folder), kind.encode(), flags, options.encode()) != 0:
            error = ctypes.get_errno()
            folder.rmdir()
            raise OSError(error, os.strerror(error), str(folder))
    return folder


def _nameless(folder: Path, size: int) -> int:
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _shmem_denied() -> bool:
    return _SHMEM_ENABLED.exists() and "[deny]" in _SHMEM_ENABLED.read_text()
