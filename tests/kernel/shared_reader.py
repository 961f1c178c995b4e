"""Program that loads an object into shared memory, and reads its array `x`: `shared_reader IMAGE [MODE]`.

Each line of stdin is a request: `read N` prints element N, `sum` the sum of all elements, `write N` adds 1 to element
N. `pss` prints the proportional set size of the array's mappings, bytes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pageferry
from pageferry.errors import PageferryError
from pageferry.host.smaps import smaps


def pss(array: Any) -> int:
    """Return the proportional set size (PSS in smaps) of the mappings that contain an array, bytes."""
    start = int(array.__array_interface__["data"][0])
    end = start + array.nbytes
    found = [one for one in smaps(os.getpid()) if one.mapping.address < end and one.mapping.end > start]
    return sum(one.counts["Pss"] for one in found)


def main() -> None:
    """Print whether the object was loaded on demand, then the result of each request."""
    reasons: list[object] = []
    mode: Any = sys.argv[2] if len(sys.argv) > 2 else "r"
    loaded = pageferry.load(sys.argv[1], mode, memory="shared", prefetch=False, listener=reasons.append)
    x = loaded["x"]
    print(json.dumps({"eager": len(reasons)}), flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        try:
            result: object
            match what:
                case "read":
                    result = int(x[int(rest[0])])
                case "write":
                    x[int(rest[0])] += 1
                    result = None
                case "sum":
                    result = int(x.sum())
                case "pss":
                    result = pss(x)
        except PageferryError as error:
            result = str(error)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
