"""Files for guest memory: on a private tmpfs with huge pages, on hugetlbfs, or on /dev/shm.

Neither the file nor its file system has a name: the file is created with O_TMPFILE in a detached mount (fsopen(2),
fsmount(2): Linux 5.2), and QEMU inherits an open descriptor. The kernel frees the memory when the last process that has
the file open exits; nothing has to be unmounted or removed.

Kernel: `huge=always` of tmpfs(5) allocates huge pages regardless of `shmem_enabled`, except for `deny`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pageferry import _engine
from pageferry._engine import LARGE_PAGE
from pageferry.errors import UnsupportedError

_FALLBACK = Path("/dev/shm")
_HUGE_PAGE_COUNTS = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


@dataclass(frozen=True, slots=True)
class RamFile:
    """Unnamed file for guest memory, of the requested length, without allocated pages."""

    fd: int
    """Descriptor, open for reading and writing; the caller closes it."""
    warning: str | None
    """Reason why the file has no huge pages, with a remedy; None if it has them."""

    @property
    def inherited_path(self) -> str:
        """Path by which a child process opens the inherited descriptor."""
        return f"/proc/self/fd/{self.fd}"


def create_ram_file(size: int, *, hugetlb: bool = False) -> RamFile:
    """Create a file for `size` bytes of guest memory. With `hugetlb`, pages are reserved when the file is mapped.

    No page is allocated. Raises UnsupportedError if `hugetlb` is not permitted, or if too few huge pages are free.
    Without `hugetlb`, falls back to /dev/shm with a warning, and raises UnsupportedError if /dev/shm is too small.
    """
    return _hugetlb_file(size) if hugetlb else _tmpfs_file(size)


def _tmpfs_file(size: int) -> RamFile:
    try:
        descriptor = _file_on_own(_engine.large_tmpfs, size)
    except OSError as refused:
        return _fallback_file(size, refused)
    warning = None
    if _SHMEM_ENABLED.exists() and "[deny]" in _SHMEM_ENABLED.read_text():
        warning = (
            f"huge pages are disabled: {_SHMEM_ENABLED} is deny; write `never` to it, so that pageferry can enable them"
        )
    return RamFile(descriptor, warning)


def _fallback_file(size: int, refused: OSError) -> RamFile:
    limits = os.statvfs(_FALLBACK)
    if limits.f_blocks * limits.f_frsize < size:
        raise UnsupportedError(
            f"cannot allocate {size} bytes of guest memory: they do not fit on {_FALLBACK}; remount it with a larger "
            "size, or run as root"
        )
    warning = (
        f"huge pages are disabled: cannot mount a tmpfs with huge=always: {refused.strerror}; guest memory is on "
        f"{_FALLBACK}; run pageferry as root"
    )
    return RamFile(_nameless(_FALLBACK, None, size), warning)


def _hugetlb_file(size: int) -> RamFile:
    if size % LARGE_PAGE:
        raise UnsupportedError(
            f"invalid memory size for `hugetlb`: {size} bytes are not a multiple of 2 MiB; change -m"
        )
    needed, available = size // LARGE_PAGE, _huge_pages_available()
    if available < needed:
        raise UnsupportedError(
            f"cannot use `hugetlb`: {needed} free pages of 2 MiB are required, {available} are available; add "
            f"{needed - available} to /proc/sys/vm/nr_hugepages"
        )
    try:
        return RamFile(_file_on_own(_engine.hugetlbfs, size), None)
    except OSError as refused:
        raise UnsupportedError(f"cannot mount hugetlbfs: {refused.strerror}; run as root") from refused


def _huge_pages_available() -> int:
    """Return the number of free, unreserved huge pages, plus the number of surplus pages that the kernel can still
    add."""
    if not _HUGE_PAGE_COUNTS.is_dir():
        return 0

    def count(name: str) -> int:
        return int((_HUGE_PAGE_COUNTS / name).read_text())

    surplus = count("nr_overcommit_hugepages") - count("surplus_hugepages")
    return count("free_hugepages") - count("resv_hugepages") + max(surplus, 0)


def _file_on_own(mount: Callable[[int], int], size: int) -> int:
    """Create an unnamed file on a new detached file system. Raises OSError if this process may not mount one."""
    folder = mount(-(-size // LARGE_PAGE) * LARGE_PAGE)
    try:
        return _nameless(".", folder, size)
    finally:
        os.close(folder)


def _nameless(folder: Path | str, below: int | None, size: int) -> int:
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=below)
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
