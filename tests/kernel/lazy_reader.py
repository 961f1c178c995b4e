"""Program that restores an arena from the URL of an image, and reads words of its memory on request.

python lazy_reader.py URL [OPTIONS as JSON]      prints a line when the arena is restored, then one for each line read:
an index of a word (8 bytes): the word; `load`: `loaded`, or the error; `sum`: the sum of the first words of all pages;
`block INDEX`: nothing; a thread reads 4 MiB from this word on, without the GIL
"""

from __future__ import annotations

import json
import sys
import threading

import pageferry
from pageferry.errors import ImageError


def main() -> None:
    """Restore, and serve requests until standard input ends."""
    options = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    arena = pageferry.restore(sys.argv[1], **options)
    words = memoryview(arena).cast("B").cast("Q")
    print(arena.deferred, flush=True)
    for line in sys.stdin:
        request = line.strip()
        if request == "load":
            try:
                arena.load()
                print("loaded", flush=True)
            except ImageError as error:
                print(error, flush=True)
        elif request == "sum":
            print(sum(words[at] for at in range(0, len(words), 512)), flush=True)
        elif request.startswith("block "):
            import numpy as np  # its reductions release the GIL

            part = np.frombuffer(words, "u8")[int(request.split()[1]) :][: 4 << 17]
            threading.Thread(target=part.sum, daemon=True).start()
        else:
            print(words[int(request)], flush=True)


if __name__ == "__main__":
    main()
