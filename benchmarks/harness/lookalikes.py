"""Process with private memory on huge pages, some of which contain many duplicate pages.

`python -m benchmarks.harness.lookalikes MIB RICH PER_RICH SEED`: one of every RICH huge pages contains PER_RICH
duplicate base pages (a quarter of them zeros, the others from a library of contents). Every other huge page contains
one or two, such as a shared header or an empty table. The process prints its pid and the address of the memory, and
exits at the end of standard input.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys

LARGE, SMALL = 2 << 20, 4 << 10
SLOTS = LARGE // SMALL
LIBRARY = 2000
"""Number of different pages in the library."""


def fill(memory: mmap.mmap, start: int, units: int, rich: int, per_rich: int, seed: int) -> None:
    """Fill `units` huge pages of the memory from `start` on."""
    choice = random.Random(seed)
    library = [random.Random(number).randbytes(SMALL) for number in range(LIBRARY)]
    for unit in range(units):
        at = start + unit * LARGE
        memory[at : at + LARGE] = os.urandom(LARGE)
        count = per_rich if unit % rich == 0 else choice.randrange(1, 3)
        for slot in choice.sample(range(SLOTS), count):
            content = bytes(SMALL) if choice.random() < 0.25 else choice.choice(library)
            memory[at + slot * SMALL : at + (slot + 1) * SMALL] = content


def main() -> None:
    """Fill the memory, and wait for the end of standard input."""
    mib, rich, per_rich, seed = map(int, sys.argv[1:])
    length = mib << 20
    memory = mmap.mmap(-1, length + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    start = -base % LARGE
    fill(memory, start, length // LARGE, rich, per_rich, seed)
    print(os.getpid(), base + start, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
