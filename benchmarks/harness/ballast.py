"""Reserve of memory that the host has already allocated.

On a hypervisor that reclaims freed memory, the first access to a page takes a hundred times longer than the kernel's
own work. This time would dominate every measurement. A ballast holds allocated memory, and frees it right before a
measurement. The hypervisor takes seconds to reclaim freed pages, so the kernel can reuse them. All compared methods get
the same amount of memory in the same way.
"""

from __future__ import annotations

import mmap

LARGE_PAGE = 2 << 20
_POPULATE_WRITE = 23
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Ballast:
    """Allocated memory of `size` bytes, on huge pages if available."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: mmap.mmap | None = None

    def hold(self) -> None:
        """Allocate the memory. This is fast for memory that was freed recently, otherwise slow."""
        if self._held is None:
            self._held = mmap.mmap(-1, self.size, flags=_FLAGS)
            self._held.madvise(mmap.MADV_HUGEPAGE)
            self._held.madvise(_POPULATE_WRITE)

    def release(self) -> None:
        """Free the memory. The measured processes must allocate it within about a second, before it is reclaimed."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def __enter__(self) -> Ballast:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
