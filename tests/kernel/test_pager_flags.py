"""Deferred bitmap, in which a receiver sets bits before it starts a pager."""

from __future__ import annotations

import os

from pageferry._engine import Pager, PageSet


def test_flags_are_set_over_all_regions() -> None:
    """Bit n stands for page n, counted over all regions, even if a region is not a multiple of eight pages."""
    first, second = PageSet(70), PageSet(300)
    first.insert(3, 5)
    first.insert(69, 70)
    second.insert(0, 1)
    second.insert(200, 300)
    flags = os.memfd_create("flags")
    try:
        os.ftruncate(flags, Pager.flags_length(370))
        Pager.set_flags(flags, [first, second])
        bits = int.from_bytes(os.pread(flags, Pager.flags_length(370), 0), "little")
    finally:
        os.close(flags)
    assert [page for page in range(bits.bit_length()) if bits >> page & 1] == [3, 4, 69, 70, *range(270, 370)]
