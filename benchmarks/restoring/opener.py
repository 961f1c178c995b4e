"""Opens an arena from an image in a process of its own: `python -m benchmarks.restoring.opener IMAGE lazy|eager`.

Prints JSON: milliseconds until the arena can be used (`restore` has returned and its first byte been read), the median
of further accesses all over it, microseconds, and milliseconds until all of it is there.
"""

from __future__ import annotations

import json
import random
import sys
import time
from statistics import median

import pageferry

ACCESSES = 200


def main() -> None:
    """Open, touch, wait."""
    path, mode = sys.argv[1:]
    begin = time.perf_counter()
    arena = pageferry.restore(path, eager=mode == "eager")
    if mode == "eager":
        arena.load()
    view = memoryview(arena)
    first = view[len(view) // 2]
    opened = time.perf_counter()
    times = []
    choice = random.Random(1)
    for _ in range(ACCESSES):
        at = choice.randrange(len(view))
        start = time.perf_counter()
        first += view[at]
        times.append(time.perf_counter() - start)
    faults, missed, *_ = arena.pager.counters
    arena.load()
    end = time.perf_counter()
    found = {"open-ms": (opened - begin) * 1e3, "access-us": median(times) * 1e6, "complete-ms": (end - begin) * 1e3}
    print(json.dumps(found | {"faults": faults, "missed": missed}))


if __name__ == "__main__":
    main()
