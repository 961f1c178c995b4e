"""Process that reads pages of a mapped file and times each read: `python -m benchmarks.postcopy.toucher`.

Arguments: an inherited descriptor, and the length in bytes. The process prints the address of the mapping. For each
line of standard input, a JSON list of page indices, the process prints the list of read times in nanoseconds.
"""

from __future__ import annotations

import json
import sys
import time

from pageferry._engine import SMALL_PAGE, Mapping


def main() -> None:
    """Read the requested pages until the end of standard input."""
    descriptor, length = map(int, sys.argv[1:])
    mapping = Mapping(descriptor, length)
    view, clock = memoryview(mapping), time.perf_counter_ns
    print(mapping.address, flush=True)
    for line in sys.stdin:
        places = [page * SMALL_PAGE for page in json.loads(line)]
        times = []
        for place in places:
            begin = clock()
            view[place]
            times.append(clock() - begin)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
