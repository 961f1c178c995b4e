"""Process that opens an arena from an image: `python -m benchmarks.restore.opener IMAGE MODE`.

- `lazy`: load memory on demand, with prefetch
- `demand`: load memory on demand, without read-ahead
- `eager`: wait until all memory is loaded
- `peek`: read one page through the file
- `whole`: read one page through the file after all memory has been loaded

The process prints JSON with the milliseconds until the arena is usable: `restore` has returned and one byte has been
read. With the first three modes, the JSON also has the median latency of random accesses in microseconds, and the
milliseconds until all memory is loaded. With the last two, the JSON has the results of `peek`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from statistics import median

import pageferry
from pageferry.checkpoints.restore_arena import RestoredArena
from pageferry.memory.regions import SMALL_PAGE

ACCESSES = 200


def peek(arena: RestoredArena) -> dict[str, float]:
    """Read a page through the file instead of the mapping.

    Return the total number of bytes read from the image, and the duration of the access in milliseconds.
    """
    begin = time.perf_counter()
    at = len(memoryview(arena)) // 2
    arena.ensure(at, SMALL_PAGE)
    os.pread(arena.descriptor, SMALL_PAGE, at)
    return {"bytes-read": arena.pager.counters.bytes_read, "peek-ms": (time.perf_counter() - begin) * 1e3}


def main() -> None:
    """Open the arena, access pages, and wait until all memory is loaded."""
    path, mode = sys.argv[1:]
    begin = time.perf_counter()
    arena = pageferry.restore(path, eager=mode == "eager", prefetch=mode in ("lazy", "eager"))
    if mode in ("eager", "whole"):
        arena.load()
    view = memoryview(arena)
    first = 0 if mode == "peek" else view[len(view) // 2]
    opened = time.perf_counter()
    if mode in ("peek", "whole"):
        print(json.dumps(peek(arena) | {"open-ms": (opened - begin) * 1e3}))
        return
    times = []
    choice = random.Random(1)
    for _ in range(ACCESSES):
        at = choice.randrange(len(view))
        start = time.perf_counter()
        first += view[at]
        times.append(time.perf_counter() - start)
    counters = arena.pager.counters
    arena.load()
    end = time.perf_counter()
    found = {"open-ms": (opened - begin) * 1e3, "access-us": median(times) * 1e6, "complete-ms": (end - begin) * 1e3}
    print(
        json.dumps(
            found
            | {
                "faults": counters.faults,
                "missed": counters.missed,
                "read-kib": counters.bytes_read / 1024 / max(counters.missed, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
