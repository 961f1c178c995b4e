"""Program that loads an array and prints the durations of its accesses as JSON: `python -m benchmarks.python.reader`.

Arguments: the format, the path, and `random` or `pass`. Each measurement runs in a new process, which has not loaded
any page.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from benchmarks.python.formats import FORMATS

READS = 1000
"""Number of random reads."""
CHUNK = 1 << 17
"""Number of elements per step of a full pass."""


def main(name: str, path: str, access: str) -> None:
    """Measure, and print the result."""
    load = FORMATS[name].load
    __import__(FORMATS[name].needs)
    began = time.perf_counter()
    array = load(path)
    float(array[0])
    durations = {"first-ms": (time.perf_counter() - began) * 1e3}
    length = array.get_shape()[0] if hasattr(array, "get_shape") else len(array)
    began = time.perf_counter()
    if access == "random":
        for position in np.random.default_rng(1).integers(0, length, READS):
            float(array[int(position)])
        durations["random-us"] = (time.perf_counter() - began) / READS * 1e6
    else:
        for start in range(0, length, CHUNK):
            array[start : start + CHUNK].sum()
        durations["pass-ms"] = (time.perf_counter() - began) * 1e3
    print(json.dumps(durations))


if __name__ == "__main__":
    main(*sys.argv[1:])
