"""Program with an arena restored from an image on demand, without prefetch: `restored_owner IMAGE NAME`.

Commands on standard input:

- `touch PAGE`: read the first byte of a page
- `load`: load all memory
- `check`: print a hash of all memory
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import pageferry


def main() -> None:
    """Print the number of deferred bytes, and execute the commands read from standard input."""
    arena = pageferry.restore(sys.argv[1], name=sys.argv[2], prefetch=False, on_pause=lambda: None)
    memory = memoryview(arena)
    os.write(1, json.dumps(arena.deferred).encode() + b"\n")
    for line in sys.stdin:
        order, *rest = line.split()
        answer: object = None
        if order == "touch":
            answer = memory[int(rest[0]) * 4096]
        elif order == "load":
            arena.load()
        elif order == "check":
            answer = hashlib.sha256(memory).hexdigest()
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
