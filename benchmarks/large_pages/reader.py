"""Process that reads memory and counts its accesses: `python -m benchmarks.large_pages.reader KIND SIZE MODE`.

- KIND: `shared` or `anon`
- SIZE: MiB of memory
- MODE: `random` reads words of three quarters of the huge pages at random, and never the last quarter; `pattern` reads
  known numbers of base pages in turn (see `truth`)

The process prints `{"address": ..., "counter": ...}`: the address of the memory, and the path of a file of 8 bytes with
the number of accesses.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile

import numpy as np

from pageferry._engine import LARGE_PAGE, SMALL_PAGE, Mapping
from pageferry.workloads.arena.arena import memory_file

SLOTS = LARGE_PAGE // SMALL_PAGE
HOT = 0.75
BATCH = 1 << 16


def truth(unit: int) -> int:
    """Return the number of base pages, from the start of a huge page, that are accessed in mode `pattern`."""
    return (0, 1, 8, 64, 200, 511, 512)[unit % 7]


def allocate(kind: str, size: int) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.uint64]], object]:
    """Allocate memory on huge pages.

    Return its address, its contents as an array, and an object that keeps the memory allocated.
    """
    if kind == "shared":
        mapping = Mapping(memory_file(size)[0], size)
        return mapping.address, np.frombuffer(memoryview(mapping), dtype=np.uint64), mapping
    memory = mmap.mmap(-1, size + 2 * LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint64)
    start = whole.ctypes.data
    address = (start + LARGE_PAGE) // LARGE_PAGE * LARGE_PAGE
    first = (address - start) // 8
    return address, whole[first : first + size // 8], memory


def indices(mode: str, size: int) -> list[np.ndarray[tuple[int], np.dtype[np.intp]]]:
    """Return batches of indices to read, in 8-byte words."""
    if mode == "pattern":
        pages = [unit * SLOTS + slot for unit in range(size // LARGE_PAGE) for slot in range(truth(unit))]
        return [np.array(pages, dtype=np.intp) * (SMALL_PAGE // 8)]
    randomly = np.random.default_rng(1)
    words = int(size * HOT) // LARGE_PAGE * LARGE_PAGE // 8
    return [randomly.integers(0, words, BATCH) for _ in range(64)]


def main() -> None:
    """Read the memory until killed."""
    kind, size, mode = sys.argv[1], int(sys.argv[2]) << 20, sys.argv[3]
    address, memory, _keep = allocate(kind, size)
    memory[:] = 1
    descriptor, path = tempfile.mkstemp()
    os.truncate(descriptor, 8)
    counter = np.frombuffer(mmap.mmap(descriptor, 8), dtype=np.uint64)
    print(json.dumps({"address": address, "counter": path}), flush=True)
    batches = indices(mode, size)
    while True:
        for batch in batches:
            memory.take(batch)
            counter[0] += len(batch)


if __name__ == "__main__":
    main()
