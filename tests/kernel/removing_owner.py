"""Program that removes parts of its arena, or maps the arena again: `removing_owner NAME PAGES [IMAGE]`.

Each page contains its index plus one, 512 times. IMAGE: image from which the arena is restored on demand. A line of
standard input contains commands `CALL FIRST COUNT`, separated by `;`. FIRST and COUNT give the range, in pages. CALL:

- `unmap`: madvise(MADV_DONTNEED)
- `remove`: madvise(MADV_REMOVE)
- `punch`: fallocate(2), which punches a hole in the memory file
- `look`: no change
- `again`: no change; the reply to the line refers to a new mapping

The reply to a line lists the pages whose contents have changed, as [page, first word].
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import sys

import numpy as np

import pageferry
from pageferry.workloads.arena import arena as arenas

PAGE = 4096
MADVICE = {"unmap": 4, "remove": 9}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def other(memory: object, pages: int) -> list[list[int]]:
    """Return the pages whose contents differ from those written initially, as [page, first word]."""
    words = np.frombuffer(memory, dtype=np.uint64).reshape(-1, 512)  # type: ignore[call-overload]
    wrong = np.flatnonzero((words != np.arange(1, pages + 1, dtype=np.uint64)[:, None]).any(axis=1))
    return [[int(page), int(words[page, 0])] for page in wrong]


def _denied(size: int) -> int:
    raise PermissionError(errno.EPERM, "no mounts")


def main() -> None:
    """Execute the commands read from standard input."""
    name, pages = sys.argv[1], int(sys.argv[2])
    if os.environ.get("MEMORY") == "memfd":
        arenas._tmpfs_file = _denied
    arena: pageferry.Arena
    if len(sys.argv) > 3:
        arena = pageferry.restore(sys.argv[3], name=name, prefetch=False, on_pause=lambda: None)
    else:
        arena = pageferry.Arena(pages * PAGE, name, on_pause=lambda: None)
        words = np.frombuffer(arena, dtype=np.uint64).reshape(-1, 512)  # type: ignore[call-overload]
        words[:] = np.arange(1, pages + 1, dtype=np.uint64)[:, None]
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        memory: object = arena
        for order in line.split(";"):
            call, first, count = order.split()
            start, length = int(first) * PAGE, int(count) * PAGE
            if call in MADVICE:
                assert _libc.madvise(arena.address + start, length, MADVICE[call]) == 0
            elif call == "punch":
                assert _libc.fallocate(arena.fileno(), 3, start, length) == 0
            elif call == "again":
                memory = mmap.mmap(arena.fileno(), pages * PAGE)
        print(json.dumps(other(memory, pages)), flush=True)


if __name__ == "__main__":
    main()
