"""Tests of the allocation of extents against a model: a set of free bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.objects.extents import Extents

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["allocate", "release", "take"]), st.integers(0, 40), st.integers(0, 3))
)


@given(OPERATIONS)
def test_extents_match_a_set_of_bytes(operations: list[tuple[str, int, int]]) -> None:
    extents, free, used = Extents(3, 100), set(range(3, 100)), list[tuple[int, int]]()
    for kind, number, power in operations:
        if kind == "allocate":
            length, alignment = max(number, 1), 1 << power
            offset = extents.allocate(length, alignment)
            fits = [at for at in range(0, 100, alignment) if set(range(at, at + length)) <= free]
            assert offset == (fits[0] if fits else None)
            if offset is not None:
                used.append((offset, length))
                free -= set(range(offset, offset + length))
        elif kind == "release" and used:
            offset, length = used.pop(number % len(used))
            extents.release(offset, length)
            free |= set(range(offset, offset + length))
        elif kind == "take":
            part = set(range(number * 2, number * 2 + power + 1))
            assert extents.take(number * 2, power + 1) == (part <= free)
            if part <= free:
                used.append((number * 2, power + 1))
                free -= part
        found = list(extents)
        assert {byte for offset, length in found for byte in range(offset, offset + length)} == free
        assert extents.free == len(free)
        assert all(first[0] + first[1] < second[0] for first, second in pairwise(found))
        assert list(Extents(3, 100, used)) == found


def test_extent_that_is_free_cannot_be_released() -> None:
    extents = Extents(0, 100)
    offset = extents.allocate(10, 1)
    assert offset == 0
    extents.release(0, 10)
    for wrong in (0, 5, 95):
        with pytest.raises(ValueError, match="already free"):
            extents.release(wrong, 5)


@pytest.mark.parametrize("used", [[(0, 10), (5, 10)], [(95, 10)], [(-1, 5)], [(4, -1)]])
def test_invalid_extents_are_refused(used: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="overlaps"):
        Extents(0, 100, used)
