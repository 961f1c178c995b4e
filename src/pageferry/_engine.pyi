"""Per-page and per-fault work of pageferry, in Rust. This stub is its reference.

All lengths, offsets and addresses are bytes unless named otherwise. Calls that take longer than 50 microseconds
release the GIL; long ones check for Ctrl-C. Errors of the kernel are raised as `OSError` with its errno.
"""

from collections.abc import Sequence
from typing import final

SMALL_PAGE: int
LARGE_PAGE: int

class Mapping:
    """A shared mapping of (part of) a file at a 2 MiB boundary of our own address space, with the buffer protocol.

    `memoryview(m)` and `numpy.frombuffer(m, ...)` are writable views without a copy. The descriptor is duplicated.
    """

    def __new__(cls, fd: int, length: int, offset: int = 0) -> Mapping: ...
    @property
    def address(self) -> int: ...
    @property
    def length(self) -> int: ...
    def fileno(self) -> int: ...
    def data_ranges(self) -> list[tuple[int, int]]:
        """(start, end) of the parts that hold data (SEEK_DATA/SEEK_HOLE): reading anything else would allocate."""
    def large_units(self) -> list[bool]:
        """Which 2 MiB units stand on a large page; holes are left alone."""
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def large_tmpfs(size: int) -> int:
    """A detached tmpfs mount with huge=always (fsopen/fsmount): a directory descriptor to use with O_TMPFILE.

    Nothing is mounted in any namespace: the mount goes with its last descriptor. OSError EPERM without CAP_SYS_ADMIN.
    """

@final
class Ledger:
    """The built-in workload (demo, tests): threads that rewrite self-describing pages of a mapping.

    See the docs of the engine's `ledger` module for the layout. A lost, stale or torn write is found by `verify`.
    """
