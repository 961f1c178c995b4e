"""Kernel calls of probes: userfaultfd, PAGEMAP_SCAN and madvise on memory of this process.

The engine makes all calls except the ioctls of userfaultfd that only probes need. The structures and numbers of these
ioctls are those of linux/userfaultfd.h.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pageferry import _engine
from pageferry._engine import Advice
from pageferry.host.probes.child import Unavailable

SMALL_PAGE = _engine.SMALL_PAGE
LARGE_PAGE = _engine.LARGE_PAGE

FEATURES = (
    *("wp", "fork", "remap", "remove", "missing-hugetlbfs", "missing-shmem", "unmap", "sigbus", "thread-id"),
    *("minor-hugetlbfs", "minor-shmem", "exact-address", "wp-hugetlbfs-shmem", "wp-unpopulated", "poison"),
    *("wp-async", "move"),
)
"""Features of userfaultfd, by bit number."""

DEVICE = "/dev/userfaultfd"
"""Device through which any user with access to it can create a userfaultfd for kernel and user-mode faults."""

MISSING, WP, MINOR = 1, 2, 4
"""Modes of a registration with a userfaultfd."""
FAULT_WP, FAULT_MINOR = 2, 4
"""Flags of a reported fault."""

_USERFAULTFD_IOC_NEW = 0xAA00
_EVENT_PAGEFAULT = 0x12
_FAULT_TIMEOUT_MS = 3000

_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_WRITEPROTECT = 0xC018AA06
_UFFDIO_CONTINUE = 0xC020AA07
_UFFDIO_POISON = 0xC020AA08

T = TypeVar("T")


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Set the file name of an OSError that is raised in the block to `name`, the name of the failed step."""
    try:
        yield
    except OSError as refused:
        if refused.errno is None:
            raise
        raise OSError(refused.errno, os.strerror(refused.errno), name) from None


def ioctl(descriptor: int, name: str, request: int, layout: str, *fields: int) -> tuple[int, ...]:
    """Make an ioctl with a structure of these fields. Return the fields as modified by the kernel.

    Raises OSError with the failed step as its file name.
    """
    argument = bytearray(struct.pack(layout, *fields))
    with step(name):
        fcntl.ioctl(descriptor, request, argument, True)
    return struct.unpack(layout, argument)


def madvise(address: int, length: int, advice: Advice) -> None:
    """Advise the kernel about memory of this process. Raises OSError with the advice as its file name."""
    with step(f"MADV_{str(advice).rpartition('.')[2]}"):
        _engine.Space().madvise(address, length, advice)


def present(address: int, length: int) -> list[tuple[int, int]]:
    """Return the parts of a range whose pages are mapped (PAGEMAP_SCAN), as (start, end)."""
    with step("PAGEMAP_SCAN"):
        return _engine.Space().present(address, length)


def large_pages_mapped(address: int, pid: int | None = None) -> bool:
    """Return whether a 2 MiB unit of a process, by default this one, is mapped as one page (PAGEMAP_SCAN)."""
    with step("PAGEMAP_SCAN"):
        return _engine.Space(pid).large_mapped(address, LARGE_PAGE) == [(address, address + LARGE_PAGE)]


class Anonymous:
    """Private memory of this process, aligned to 2 MiB. It is never unmapped."""

    def __init__(self, length: int) -> None:
        first = _engine.Space().mmap(length + LARGE_PAGE)
        self.address = -(-first // LARGE_PAGE) * LARGE_PAGE
        self.length = length


def shared_memory(length: int = LARGE_PAGE, flags: int = 0) -> _engine.Mapping:
    """Return a mapping of a new memfd, created with these flags (`os.MFD_...`)."""
    file = os.memfd_create("pageferry-check", os.MFD_CLOEXEC | flags)
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
    """Unresolved page fault, whose thread waits."""

    flags: int
    address: int


class Userfault:
    """Userfaultfd of this process with the given features."""

    def __init__(self, *features: str, user_mode_only: bool | None = None) -> None:
        """Create the userfaultfd. `user_mode_only`: whether it handles user-mode faults only; None to handle kernel
        faults too unless the kernel denies them, as in the engine."""
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
        try:
            with step("userfaultfd"):
                return _engine.userfaultfd(user_mode_only=self.user_mode_only)
        except OSError as refused:
            if self.user_mode_only:
                raise
            try:
                file = _userfaultfd_of_device(os.O_CLOEXEC | os.O_NONBLOCK)
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
        source = shared_memory()
        memoryview(source)[: len(content)] = content
        ioctl(self.fd, "UFFDIO_COPY", _UFFDIO_COPY, "=4Qq", address, source.address, len(content), 0, 0)

    def map_existing(self, address: int, length: int) -> None:
        """Map pages that exist in the page cache (UFFDIO_CONTINUE)."""
        ioctl(self.fd, "UFFDIO_CONTINUE", _UFFDIO_CONTINUE, "=3Qq", address, length, 0, 0)

    def poison(self, address: int, length: int) -> None:
        """Make every access to missing pages fail (UFFDIO_POISON)."""
        ioctl(self.fd, "UFFDIO_POISON", _UFFDIO_POISON, "=3Qq", address, length, 0, 0)

    def wait(self) -> Fault:
        """Return the next fault. Raises Unavailable if none is reported within 3 seconds."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(_FAULT_TIMEOUT_MS):
            raise Unavailable("the kernel did not report the fault")
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


def expect(condition: bool, otherwise: str) -> None:
    """Raise Unavailable with the reason `otherwise` unless the condition holds."""
    if not condition:
        raise Unavailable(otherwise)
