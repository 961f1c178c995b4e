"""Clone of a base: a process that reads and writes random pages of its memory, and verifies every word that it reads.

Arguments: the path of the base, the length of the memory in bytes, a file with the expected contents, and a seed. The
parent process replaces the memory, which is a shared file at first, before it writes the first line to stdin.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys

import numpy as np

LARGE = 2 << 20
WORDS = 512


def aligned(length: int) -> tuple[mmap.mmap, int]:
    """Map a shared file. Return the mapping, and the offset of its first byte at a multiple of 2 MiB."""
    scratch = os.memfd_create("scratch")
    os.ftruncate(scratch, length + LARGE)
    mapping = mmap.mmap(scratch, length + LARGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    return mapping, -address % LARGE


def main() -> None:
    """Print the address of the memory and the descriptor of the base. The first line of stdin is a number of rounds: in
    each round, read random words, and in every 32nd round, write, too. Then verify all memory."""
    base = os.open(sys.argv[1], os.O_RDONLY)
    length, seed = int(sys.argv[2]), int(sys.argv[4])
    expected = np.fromfile(sys.argv[3], dtype=np.uint64).reshape(-1, WORDS)
    mapping, offset = aligned(length)
    memory = np.frombuffer(mapping, dtype=np.uint64, count=length // 8, offset=offset).reshape(-1, WORDS)
    sys.stdout.write(json.dumps({"address": memory.ctypes.data, "descriptor": base}) + "\n")
    sys.stdout.flush()
    random, reads, bad, writes = np.random.default_rng(seed), 0, 0, 0
    for number in range(int(sys.stdin.readline())):
        pages, words = random.integers(0, len(expected), 32), random.integers(0, WORDS, 32)
        bad += int((memory[pages, words] != expected[pages, words]).sum())
        reads += 32
        if number % 32 == 0:
            page = int(random.integers(0, len(expected)))
            memory[page, :7] = expected[page, :7] = seed
            writes += 1
    bad += int((memory != expected).sum())
    sys.stdout.write(json.dumps({"reads": reads, "bad": bad, "writes": writes}) + "\n")
    sys.stdout.flush()
    sys.stdin.readline()


main()
