"""Kernel calls that only probes make: userfaultfd, PAGEMAP_SCAN and madvise on memory of this process.

What workloads need of these is in the engine, and probes use the engine for it. Structures and numbers are those of
linux/userfaultfd.h and linux/fs.h.
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
"""Features of userfaultfd, by bit."""

DEVICE = "/dev/userfaultfd"
"""Gives a userfaultfd for all faults to each user that may open it."""

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

# Calls through it release the GIL: a thread that waits for a fault to be served must not keep others from serving it.
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
for _function in (libc.read, libc.write):
    _function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    _function.restype = ctypes.c_ssize_t
libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

T = TypeVar("T")


def checked(result: int, step: str) -> int:
    """The result of a libc call; -1 raises OSError with the step that failed as its file name."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), step)
    return result


def system_call(step: str, number: int, *arguments: int) -> int:
    """Make a system call. Raises OSError with the step that failed as its file name."""
    return checked(libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments)), step)


def ioctl(descriptor: int, step: str, request: int, layout: str, *fields: int) -> tuple[int, ...]:
    """An ioctl with a structure of those fields; returns them as the kernel left them. Raises OSError with the step."""
    argument = bytearray(struct.pack(layout, *fields))
    try:
        fcntl.ioctl(descriptor, request, argument, True)
    except OSError as refused:
        raise OSError(refused.errno, refused.strerror, step) from None
    return struct.unpack(layout, argument)


def read_memory(address: int, length: int) -> bytes:
    """Bytes at an address of ours; may wait for a fault to be served by another thread."""
    buffer = ctypes.create_string_buffer(length)
    libc.memcpy(buffer, address, length)
    return buffer.raw


def write_memory(address: int, content: bytes) -> None:
    """Put bytes at an address of ours; may wait like `read_memory`."""
    libc.memcpy(address, content, len(content))


def madvise(address: int, length: int, advice: int, step: str) -> None:
    """madvise(2). Raises OSError naming the step."""
    checked(libc.madvise(address, length, advice), step)


def large_pages_mapped(address: int, pid: int | str = "self") -> bool:
    """Whether a 2 MiB unit of a process is mapped as one page (PAGEMAP_SCAN)."""
    return scan(address, address + LARGE_PAGE, PAGE_IS_PRESENT | PAGE_IS_HUGE, pid) == [(address, address + LARGE_PAGE)]


def scan(start: int, end: int, categories: int, pid: int | str = "self") -> list[tuple[int, int]]:
    """Ranges of a process whose pages are of all the categories, as (start, end)."""
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
    """Private memory of this process, at a 2 MiB boundary. It stays until the process ends."""

    def __init__(self, length: int) -> None:
        self._map = mmap.mmap(-1, length + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._first = ctypes.c_char.from_buffer(self._map)
        self.address = -(-ctypes.addressof(self._first) // LARGE_PAGE) * LARGE_PAGE
        self.length = length


def shared_memory(length: int = LARGE_PAGE) -> _engine.Mapping:
    """A fresh memfd, mapped."""
    file = os.memfd_create("pageferry-check", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, length)
        return _engine.Mapping(file, length)
    finally:
        os.close(file)


def _userfaultfd_of_device(flags: int) -> int:
    """A userfaultfd by `DEVICE`. Raises OSError."""
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that waits to be served."""

    flags: int
    address: int


class Userfault:
    """A userfaultfd of this process with the features named."""

    def __init__(self, *features: str, user_mode_only: bool | None = None) -> None:
        """`user_mode_only` None: only where the other kind is refused, as the engine has it."""
        self.user_mode_only = bool(user_mode_only)
        self.by_device = False
        """Whether it was created by `DEVICE`, because the system call is refused."""
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
        """Trap the faults of `mode` in a range."""
        ioctl(self.fd, "UFFDIO_REGISTER", _UFFDIO_REGISTER, "=4Q", address, length, mode, 0)

    def unregister(self, address: int, length: int) -> None:
        """Trap them no more."""
        ioctl(self.fd, "UFFDIO_UNREGISTER", _UFFDIO_UNREGISTER, "=2Q", address, length)

    def write_protect(self, address: int, length: int, protect: bool) -> None:
        """Protect a range, or release it and wake who waits there."""
        ioctl(self.fd, "UFFDIO_WRITEPROTECT", _UFFDIO_WRITEPROTECT, "=3Q", address, length, int(protect))

    def copy(self, address: int, content: bytes) -> None:
        """Install missing pages with content."""
        source = ctypes.create_string_buffer(content, len(content))
        arguments = (address, ctypes.addressof(source), len(content), 0, 0)
        ioctl(self.fd, "UFFDIO_COPY", _UFFDIO_COPY, "=4Qq", *arguments)

    def move(self, address: int, source: int, length: int) -> None:
        """Move pages from elsewhere in this process to where they are missing."""
        ioctl(self.fd, "UFFDIO_MOVE", _UFFDIO_MOVE, "=4Qq", address, source, length, 0, 0)

    def map_existing(self, address: int, length: int) -> None:
        """Map pages that are in the page cache (UFFDIO_CONTINUE)."""
        ioctl(self.fd, "UFFDIO_CONTINUE", _UFFDIO_CONTINUE, "=3Qq", address, length, 0, 0)

    def poison(self, address: int, length: int) -> None:
        """Make every access to missing pages fail."""
        ioctl(self.fd, "UFFDIO_POISON", _UFFDIO_POISON, "=3Qq", address, length, 0, 0)

    def wait(self) -> Fault:
        """The next fault. Raises Unavailable when none comes."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(_FAULT_TIMEOUT_MS):
            raise Unavailable("an access that should have been trapped was not")
        event, _, _, _, flags, address, _ = struct.unpack("=BBHIQQQ", os.read(self.fd, 32))
        if event != _EVENT_PAGEFAULT:
            raise Unavailable(f"the kernel reported event {event:#x} instead of a fault")
        return Fault(flags, address)

    def serve(self, access: Callable[[], T], server: Callable[[Fault], object]) -> T:
        """Run `access` in a thread, hand its fault to `server`, and return what the access then did."""
        pool = ThreadPoolExecutor(1)  # never joined: a fault that is not served would hold up the end
        future = pool.submit(access)
        server(self.wait())
        return future.result(_FAULT_TIMEOUT_MS / 1000)


def kernel_reads(address: int) -> None:
    """Let the kernel read a byte at an address. Raises OSError EFAULT where it cannot."""
    reading, writing = os.pipe()
    try:
        checked(libc.write(writing, address, 1), "write")
    finally:
        os.close(reading)
        os.close(writing)


def kernel_writes(address: int, content: bytes) -> int:
    """Let the kernel write up to a page of bytes to an address. Raises OSError EFAULT where it cannot."""
    reading, writing = os.pipe()
    try:
        os.write(writing, content)
        return checked(libc.read(reading, address, len(content)), "read")
    finally:
        os.close(reading)
        os.close(writing)


def expect(condition: bool, otherwise: str) -> None:
    """Raise Unavailable with that reason unless the condition holds."""
    if not condition:
        raise Unavailable(otherwise)
