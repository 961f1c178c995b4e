"""Memory that the machine really has when somebody asks for it.

Under a hypervisor that takes freed memory back, the first touch of a page is a matter of the hypervisor, a hundred
times slower than the kernel's own work, and would drown whatever is measured. A ballast holds touched memory and gives
it back right before it is needed: the kernel then hands out pages that are there (the hypervisor takes seconds to
notice). Every competitor gets the same amount in the same way.
"""

from __future__ import annotations

import mmap

LARGE_PAGE = 2 << 20
_POPULATE_WRITE = 23
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Ballast:
    """So many bytes of touched memory, in large pages where the kernel has them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: mmap.mmap | None = None

    def hold(self) -> None:
        """Touch all of it. Quick for memory that was freed a moment ago, slow for the rest."""
        if self._held is None:
            self._held = mmap.mmap(-1, self.size, flags=_FLAGS)
            self._held.madvise(mmap.MADV_HUGEPAGE)
            self._held.madvise(_POPULATE_WRITE)

    def release(self) -> None:
        """Free it, to be allocated by others within the next second."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def __enter__(self) -> Ballast:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
