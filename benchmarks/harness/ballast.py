"""A reserve of memory that the host has already allocated.

Under a hypervisor that reclaims freed memory, the first touch of a page depends on the hypervisor and takes a hundred
times longer than the kernel's own work, which would dominate each measurement. A ballast holds touched memory and frees
it right before a measurement, so that the kernel hands out pages that the hypervisor has not reclaimed yet (this takes
seconds). All methods that are compared get the same amount in the same way.
"""

from __future__ import annotations

import mmap

LARGE_PAGE = 2 << 20
_POPULATE_WRITE = 23
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Ballast:
    """`size` bytes of touched memory, on huge pages if available."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: mmap.mmap | None = None

    def hold(self) -> None:
        """Touch all of it. Fast for memory that was freed recently, otherwise slow."""
        if self._held is None:
            self._held = mmap.mmap(-1, self.size, flags=_FLAGS)
            self._held.madvise(mmap.MADV_HUGEPAGE)
            self._held.madvise(_POPULATE_WRITE)

    def release(self) -> None:
        """Free the memory; other processes should allocate it within a second."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def __enter__(self) -> Ballast:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
