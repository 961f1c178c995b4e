"""A table of numbers that outlives its program: saved while it is written to, and opened again in milliseconds.

    python examples/table.py fill table.img     # makes a table, and saves it while a thread goes on counting in it
    python examples/table.py open table.img     # reads from it before most of it has left the disk

Needs numpy.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import numpy

import pageferry

ROWS, COLUMNS = 64_000, 256
SIZE = ROWS * COLUMNS * 8
"""Bytes: 125 MiB."""


class Counter:
    """Counts in the last row of a table, except while the table is paused."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.row: numpy.ndarray | None = None

    def run(self, row: numpy.ndarray) -> None:
        """Count for ever."""
        while True:
            with self.turn:
                row += 1
            time.sleep(0.001)


def view(arena: pageferry.Arena) -> numpy.ndarray:
    """The table: a view of the arena's memory, not a copy."""
    return numpy.frombuffer(arena, dtype=numpy.float64).reshape(ROWS, COLUMNS)


def fill(path: str) -> None:
    """Make a table and save it."""
    counter = Counter()
    # While the image is begun nobody may write: for as long as it takes to protect the memory.
    arena = pageferry.Arena(SIZE, on_pause=counter.turn.acquire, on_resume=counter.turn.release)
    table = view(arena)
    table[:] = numpy.arange(ROWS)[:, None]
    threading.Thread(target=counter.run, args=(table[-1],), daemon=True).start()
    result = asyncio.run(pageferry.checkpoint(arena, path))
    print(f"saved {SIZE >> 20} MiB in {result.total_time:.0f} ms; nobody could write for {result.downtime:.1f} ms")


def reopen(path: str) -> None:
    """Open a saved table and read some of it."""
    begin = time.monotonic()
    arena = pageferry.restore(path)
    table = view(arena)
    seen = table[ROWS // 2, 0]
    elapsed = time.monotonic() - begin
    print(f"row {seen:.0f} read after {elapsed * 1e3:.0f} ms, when {arena.deferred >> 20} MiB were still to come")
    if not (table[:-1] == numpy.arange(ROWS - 1)[:, None]).all() or len(set(table[-1])) != 1:
        raise SystemExit("the table is not what was saved")
    print("every row is as it was saved")


if __name__ == "__main__":
    {"fill": fill, "open": reopen}[sys.argv[1]](sys.argv[2])
