"""Tests of the guest-physical addresses of RAM, parsed from the output of QEMU's monitor."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pageferry.workloads.qemu.kvm_prefault import RamRange, guest_physical, ram_ranges

# Output of QEMU 7.2, `-machine pc -m 5G -accel tcg`, abridged. Two lines end with `kvm`, which QEMU prints under KVM.
SAID = """\
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pageferry-ram kvm
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  00000000000e0000-00000000000fffff (prio 0, rom): pageferry-ram @00000000000e0000
  0000000000100000-00000000bfffffff (prio 0, ram): pageferry-ram @0000000000100000 kvm
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  0000000100000000-000000017fffffff (prio 0, ram): pageferry-ram @00000000c0000000

FlatView #2
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-000000000009ffff (prio 0, ram): pageferry-ram

FlatView #3
 AS "i440FX", root: bus master container
 Root memory region: (none)
  No rendered FlatView
"""
GIB = 1 << 30
RAM = [
    RamRange(0, 0xA0000, 0),
    RamRange(1 << 20, 3 * GIB - (1 << 20), 1 << 20),
    RamRange(4 * GIB, 2 * GIB, 3 * GIB),
]


def test_ram_ranges_are_parsed() -> None:
    assert ram_ranges(SAID, "pageferry-ram") == RAM
    assert ram_ranges(SAID.replace("\n", "\r\n"), "pageferry-ram") == RAM
    assert ram_ranges(SAID.replace("pageferry-ram", "/objects/pageferry-ram"), "pageferry-ram") == RAM
    assert ram_ranges(SAID, "vga.vram") == [RamRange(0xFD000000, 16 << 20, 0)]
    assert ram_ranges(SAID, "ram") == []
    assert ram_ranges("", "pageferry-ram") == []


def test_range_across_a_hole_is_split() -> None:
    assert guest_physical([(3 * GIB - 4096, 3 * GIB + 8192)], RAM) == [
        (3 * GIB - 4096, 3 * GIB),
        (4 * GIB, 4 * GIB + 8192),
    ]
    assert guest_physical([(0xA0000, 1 << 20)], RAM) == []


pages = st.integers(0, 5 * GIB // 4096)


@given(st.lists(st.tuples(pages, pages)))
def test_every_page_has_its_guest_physical_address(parts: list[tuple[int, int]]) -> None:
    """Compare the addresses at the edges of the ranges with a simple rule for single pages."""
    found = guest_physical([(first * 4096, last * 4096) for first, last in parts], RAM)
    inside = {edge for first, last in parts if first < last for edge in (first, last - 1)}
    for page in inside:
        offset = page * 4096
        if not 0xA0000 <= offset < 1 << 20:
            address = offset if offset < 3 * GIB else offset + GIB
            assert any(start <= address < end for start, end in found)
    wanted = sum(
        max(min(last * 4096, one.offset + one.length) - max(first * 4096, one.offset), 0)
        for first, last in parts
        for one in RAM
    )
    assert sum(end - start for start, end in found) == wanted
