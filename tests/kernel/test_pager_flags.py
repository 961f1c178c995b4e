"""Deferred bits, as a receiver sets them before it starts a pager."""

from __future__ import annotations

import os

from pageferry._engine import Pager, PageSet


def test_flags_are_set_over_all_regions() -> None:
    """Bit n of the file is page n, counted over all regions, for any length of the preceding regions."""
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
