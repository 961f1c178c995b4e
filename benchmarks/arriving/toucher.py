"""A process that reads pages of a file's mapping one by one, and times each: `python -m benchmarks.arriving.toucher`.

Arguments: a descriptor that it has inherited, and the length. It says its address; every line of standard input is a
list of pages, and is answered by a list of the nanoseconds that each read took.
"""

from __future__ import annotations

import json
import sys
import time

from pageferry._engine import SMALL_PAGE, Mapping


def main() -> None:
    """Read what is wanted until standard input ends."""
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
