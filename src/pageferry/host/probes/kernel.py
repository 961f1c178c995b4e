"""Kernel calls that only probes make: userfaultfd, PAGEMAP_SCAN and madvise on memory of this process.

The engine contains the calls that workloads need, and probes use the engine for them. Structures and numbers are those
of linux/userfaultfd.h and linux/fs.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pageferry import _engine
from pageferry.host.probes.child import Unavailable

SMALL_PAGE = _engine.SMALL_PAGE
LARGE_PAGE = _engine.LARGE_PAGE

MADV_HUGEPAGE, MADV_MERGEABLE, MADV_COLD, MADV_POPULATE_READ, MADV_POPULATE_WRITE = 14, 12, 20, 22, 23

FEATURES = (
    *("wp", "fork", "remap", "remove", "missing-hugetlbfs", "missing-shmem", "unmap", "sigbus", "thread-id"),
    *("minor-hugetlbfs", "minor-shmem", "exact-address", "wp-hugetlbfs-shmem", "wp-unpopulated", "poison"),
    *("wp-async", "move"),
)
"""Features of userfaultfd, by bit number."""

DEVICE = "/dev/userfaultfd"
"""Device that provides a userfaultfd for all faults to each user that may open it."""

MISSING, WP, MINOR = 1, 2, 4
"""Modes of a registration."""
FAULT_WP, FAULT_MINOR = 2, 4
"""Flags of a fault."""

PAGE_IS_PRESENT, PAGE_IS_HUGE = 1 << 3, 1 << 6

_SYS_USERFAULTFD = 323
_USER_MODE_ONLY = 1
_USERFAULTFD_IOC_NEW = 0xAA00
_EVENT_PAGEFAULT = 0x12
_FAULT_TIMEOUT_MS = 3000

_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_MOVE = 0xC028AA05
_UFFDIO_WRITEPROTECT = 0xC018AA06
_UFFDIO_CONTINUE = 0xC020AA07
_UFFDIO_POISON = 0xC020AA08
_PAGEMAP_SCAN = 0xC0606610

# Calls through `libc` release the GIL: a thread that waits for a fault must not block the thread that resolves it.
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
for _function in (libc.read, libc.write):
    _function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    _function.restype = ctypes.c_ssize_t
libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

T = TypeVar("T")


def checked(result: int, step: str) -> int:
    """Return the result of a libc call. Raises OSError for -1, with the failed step as its file name."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), step)
    return result


def system_call(step: str, number: int, *arguments: int) -> int:
    """Make a system call and return its result. Raises OSError with the failed step as its file name."""
    return checked(libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments)), step)


def ioctl(descriptor: int, step: str, request: int, layout: str, *fields: int) -> tuple[int, ...]:
    """Make an ioctl with a structure of these fields. Return the fields as modified by the kernel.

    Raises OSError with the failed step as its file name.
    """
    argument = bytearray(struct.pack(layout, *fields))
    try:
        fcntl.ioctl(descriptor, request, argument, True)
    except OSError as refused:
        raise OSError(refused.errno, refused.strerror, step) from None
    return struct.unpack(layout, argument)


def read_memory(address: int, length: int) -> bytes:
    """Return the bytes at an address of this process. May wait until another thread resolves a fault."""
    buffer = ctypes.create_string_buffer(length)
    libc.memcpy(buffer, address, length)
    return buffer.raw


def write_memory(address: int, content: bytes) -> None:
    """Write bytes to an address of this process. May wait like `read_memory`."""
    libc.memcpy(address, content, len(content))


def madvise(address: int, length: int, advice: int, step: str) -> None:
    """Call madvise(2). Raises OSError with the failed step as its file name."""
    checked(libc.madvise(address, length, advice), step)


def large_pages_mapped(address: int, pid: int | str = "self") -> bool:
    """Return whether a 2 MiB unit of a process is mapped as one page (PAGEMAP_SCAN)."""
    return scan(address, address + LARGE_PAGE, PAGE_IS_PRESENT | PAGE_IS_HUGE, pid) == [(address, address + LARGE_PAGE)]


def scan(start: int, end: int, categories: int, pid: int | str = "self") -> list[tuple[int, int]]:
    """Return the ranges of a process whose pages are in all the categories, as (start, end)."""
    found = (ctypes.c_uint64 * (3 * 512))()
    size = 12 * 8
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        argument = bytearray(
            struct.pack("=12Q", size, 0, start, end, 0, ctypes.addressof(found), 512, 0, 0, categories, 0, categories)
        )
        try:
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument, True)
        except OSError as refused:
            raise OSError(refused.errno, refused.strerror, "PAGEMAP_SCAN") from None
    return [(found[3 * index], found[3 * index + 1]) for index in range(count)]


class Anonymous:
    """Private memory of this process, aligned to 2 MiB. It is never unmapped."""

    def __init__(self, length: int) -> None:
        self._map = mmap.mmap(-1, length + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = -(-ctypes.addressof(self._first) // LARGE_PAGE) * LARGE_PAGE
        self.length = length


def shared_memory(length: int = LARGE_PAGE) -> _engine.Mapping:
    """Return a mapping of a new memfd."""
    file = os.memfd_create("pageferry-check", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, length)
        return _engine.Mapping(file, length)
    finally:
        os.close(file)


def _userfaultfd_of_device(flags: int) -> int:
    """Create a userfaultfd through `DEVICE`. Raises OSError."""
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


@dataclass(frozen=True, slots=True)
class Fault:
    """Fault that waits to be resolved."""

    flags: int
    address: int


class Userfault:
    """Userfaultfd of this process with the given features."""

    def __init__(self, *features: str, user_mode_only: bool | None = None) -> None:
        """Create the userfaultfd. `user_mode_only` None: only if the other mode is denied, as in the engine."""
        self.user_mode_only = bool(user_mode_only)
        self.by_device = False
        """Whether the userfaultfd was created through `DEVICE`, because the system call is denied."""
        try:
            self.fd = self._open()
        except OSError:
            if user_mode_only is not None:
                raise
            self.user_mode_only = True
            self.fd = self._open()
        wanted = sum(1 << FEATURES.index(feature) for feature in features)
        _, self.offered, _ = ioctl(self.fd, "UFFDIO_API", _UFFDIO_API, "=3Q", 0xAA, wanted, 0)

    def _open(self) -> int:
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        if self.user_mode_only:
            return system_call("userfaultfd", _SYS_USERFAULTFD, flags | _USER_MODE_ONLY)
        try:
            return system_call("userfaultfd", _SYS_USERFAULTFD, flags)
        except OSError as refused:
            try:
                file = _userfaultfd_of_device(flags)
            except OSError:
                raise refused from None
            self.by_device = True
            return file

    def register(self, address: int, length: int, mode: int) -> None:
        """Register a range for faults of `mode`."""
        ioctl(self.fd, "UFFDIO_REGISTER", _UFFDIO_REGISTER, "=4Q", address, length, mode, 0)

    def unregister(self, address: int, length: int) -> None:
        """Unregister a range."""
        ioctl(self.fd, "UFFDIO_UNREGISTER", _UFFDIO_UNREGISTER, "=2Q", address, length)

    def write_protect(self, address: int, length: int, protect: bool) -> None:
        """Write-protect a range, or unprotect it and wake the waiting threads."""
        ioctl(self.fd, "UFFDIO_WRITEPROTECT", _UFFDIO_WRITEPROTECT, "=3Q", address, length, int(protect))

    def copy(self, address: int, content: bytes) -> None:
        """Install contents in missing pages (UFFDIO_COPY)."""
        source = ctypes.create_string_buffer(content, len(content))
        arguments = (address, ctypes.addressof(source), len(content), 0, 0)
        ioctl(self.fd, "UFFDIO_COPY", _UFFDIO_COPY, "=4Qq", *arguments)

    def move(self, address: int, source: int, length: int) -> None:
        """Move pages of this process to missing pages (UFFDIO_MOVE)."""
        ioctl(self.fd, "UFFDIO_MOVE", _UFFDIO_MOVE, "=4Qq", address, source, length, 0, 0)

    def map_existing(self, address: int, length: int) -> None:
        """Map pages that exist in the page cache (UFFDIO_CONTINUE)."""
        ioctl(self.fd, "UFFDIO_CONTINUE", _UFFDIO_CONTINUE, "=3Qq", address, length, 0, 0)

    def poison(self, address: int, length: int) -> None:
        """Make every access to missing pages fail (UFFDIO_POISON)."""
        ioctl(self.fd, "UFFDIO_POISON", _UFFDIO_POISON, "=3Qq", address, length, 0, 0)

    def wait(self) -> Fault:
        """Return the next fault. Raises Unavailable if none is reported in time."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(_FAULT_TIMEOUT_MS):
            raise Unavailable("an access that should have been trapped was not")
        event, _, _, _, flags, address, _ = struct.unpack("=BBHIQQQ", os.read(self.fd, 32))
        if event != _EVENT_PAGEFAULT:
            raise Unavailable(f"the kernel reported event {event:#x} instead of a fault")
        return Fault(flags, address)

    def serve(self, access: Callable[[], T], server: Callable[[Fault], object]) -> T:
        """Run `access` in a thread, pass its fault to `server`, and return the result of the access."""
        pool = ThreadPoolExecutor(1)  # never joined: an unresolved fault would delay the exit
        future = pool.submit(access)
        server(self.wait())
        return future.result(_FAULT_TIMEOUT_MS / 1000)


def kernel_reads(address: int) -> None:
    """Make the kernel read a byte at an address. Raises OSError EFAULT if it cannot."""
    reading, writing = os.pipe()
    try:
        checked(libc.write(writing, address, 1), "write")
    finally:
        os.close(reading)
        os.close(writing)


def kernel_writes(address: int, content: bytes) -> int:
    """Make the kernel write up to a page of bytes to an address. Return the number written. Raises OSError EFAULT."""
    reading, writing = os.pipe()
    try:
        os.write(writing, content)
        return checked(libc.read(reading, address, len(content)), "read")
    finally:
        os.close(reading)
        os.close(writing)


def expect(condition: bool, otherwise: str) -> None:
    """Raise Unavailable with the reason `otherwise` unless the condition holds."""
    if not condition:
        raise Unavailable(otherwise)
