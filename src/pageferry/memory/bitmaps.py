"""Bitmaps of pages and of 2 MiB units: their packed form, and their runs."""

from __future__ import annotations

from collections.abc import Iterable


def pack_units(units: list[bool]) -> bytes:
    """Pack one bit per unit, least significant bit of the first byte first."""
    number = sum(1 << position for position, unit in enumerate(units) if unit)
    return number.to_bytes((len(units) + 7) // 8, "little")


def unpack_units(packed: bytes, count: int) -> list[bool]:
    """Return `count` bits of a bitmap created by `pack_units`. Raises ValueError if the bitmap has another length."""
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"invalid bitmap of {len(packed)} bytes: expected {(count + 7) // 8} bytes for {count} units")
    return [bool(packed[number // 8] >> (number % 8) & 1) for number in range(count)]


def runs(bits: Iterable[object]) -> list[tuple[int, int]]:
    """Return the runs of true elements, as (first, last + 1)."""
    found: list[tuple[int, int]] = []
    for number, bit in enumerate(bits):
        if bit and found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        elif bit:
            found.append((number, number + 1))
    return found
