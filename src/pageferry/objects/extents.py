"""Allocation of extents in an arena: first fit over the free extents, which are kept in order and merged."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator


class Extents:
    """Free extents of `[start, end)`. All lengths and offsets are in bytes.

    The state is not stored: it is derived from the extents that a directory lists.
    """

    def __init__(self, start: int, end: int, used: Iterable[tuple[int, int]] = ()) -> None:
        """Create the free extents from the `used` ones, pairs of offset and length. Raises ValueError if these overlap,
        or lie outside of the range."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        at = start
        for offset, length in sorted(used):
            if offset < at or length < 0 or offset + length > end:
                raise ValueError(
                    f"invalid extent of {length} bytes at {offset}: it overlaps another one, or lies outside"
                )
            self._append(at, offset)
            at = offset + length
        self._append(at, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the free extents, as pairs of offset and length."""
        for start, end in zip(self._starts, self._ends, strict=True):
            yield start, end - start

    @property
    def free(self) -> int:
        """Total length of the free extents."""
        return sum(self._ends) - sum(self._starts)

    def allocate(self, length: int, alignment: int) -> int | None:
        """Allocate an extent, and return its offset; None if no free extent is long enough."""
        for index, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            offset = -(-start // alignment) * alignment
            if offset + length <= end:
                self._replace(index, [(start, offset), (offset + length, end)])
                return offset
        return None

    def take(self, offset: int, length: int) -> bool:
        """Allocate the extent at `offset`; return False if it is not free as a whole."""
        index = bisect_left(self._starts, offset + 1) - 1
        if index < 0 or offset + length > self._ends[index]:
            return False
        self._replace(index, [(self._starts[index], offset), (offset + length, self._ends[index])])
        return True

    def release(self, offset: int, length: int) -> None:
        """Free an extent. Raises ValueError if a part of it is already free."""
        if not length:
            return
        index, end = bisect_left(self._starts, offset), offset + length
        if (index and self._ends[index - 1] > offset) or (index < len(self._starts) and self._starts[index] < end):
            raise ValueError(f"cannot free the extent of {length} bytes at {offset}: a part of it is already free")
        first = last = index
        if index and self._ends[index - 1] == offset:
            first, offset = index - 1, self._starts[index - 1]
        if index < len(self._starts) and self._starts[index] == end:
            last, end = index + 1, self._ends[index]
        self._starts[first:last] = [offset]
        self._ends[first:last] = [end]

    def _append(self, start: int, end: int) -> None:
        if start < end:
            self._starts.append(start)
            self._ends.append(end)

    def _replace(self, index: int, parts: list[tuple[int, int]]) -> None:
        parts = [(start, end) for start, end in parts if start < end]
        self._starts[index : index + 1] = [start for start, _ in parts]
        self._ends[index : index + 1] = [end for _, end in parts]
