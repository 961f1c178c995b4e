"""Program that restores an arena and passes its untouched pages to write(2): `restoring_user IMAGE FILE [listen]`.

FILE: file to which the memory is written. `listen`: restore with prefetch, and record the events.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys

import pageferry


def main() -> None:
    """Print the number of deferred bytes, a hash of the memory as read by write(2), and the types of the events."""
    logging.basicConfig(level=logging.WARNING)
    events: list[object] = []
    if "listen" in sys.argv:
        arena = pageferry.restore(sys.argv[1], listener=events.append)
    else:
        arena = pageferry.restore(sys.argv[1], prefetch=False)
    deferred = arena.deferred
    with open(sys.argv[2], "wb", buffering=0) as file:
        view, done = memoryview(arena), 0
        while done < len(view):
            done += os.write(file.fileno(), view[done : done + 65536])
    with open(sys.argv[2], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kinds = sorted({type(event).__name__ for event in events})
    print(json.dumps({"deferred": deferred, "hash": digest, "events": kinds}))


if __name__ == "__main__":
    main()
