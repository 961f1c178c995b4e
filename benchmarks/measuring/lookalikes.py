"""A process with private memory on large pages, some of which hold many pages that stand elsewhere too.

`python -m benchmarks.measuring.lookalikes MIB RICH PER_RICH SEED`: one large page in RICH has PER_RICH small pages that
are worth sharing (a quarter of them zeros, the rest copies of one library of contents), and all the others have
one or two, scattered: a shared header, an empty table. Says its pid and address; ends with its standard input.
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
"""Contents that stand in many places."""


def fill(memory: mmap.mmap, start: int, units: int, rich: int, per_rich: int, seed: int) -> None:
    """Write everything."""
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
    """Be the process."""
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
