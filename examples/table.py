"""Table of numbers that outlives its program: checkpointed during writes, and reopened in milliseconds.

    python examples/table.py fill table.img     # creates a table, and checkpoints it while a thread writes to it
    python examples/table.py open table.img     # reads from the table before most of it is loaded

Requires numpy.
"""

from __future__ import annotations

import sys
import threading
import time

import numpy

import pageferry

ROWS, COLUMNS = 64_000, 256
SIZE = ROWS * COLUMNS * 8
"""Size of the table in bytes (125 MiB)."""


class Counter:
    """Thread that increments the last row of a table, except while the table is paused."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.row: numpy.ndarray | None = None

    def run(self, row: numpy.ndarray) -> None:
        """Increment the row forever."""
        while True:
            with self.turn:
                row += 1
            time.sleep(0.001)


def view(arena: pageferry.Arena) -> numpy.ndarray:
    """Return the table: a view of the arena's memory, not a copy."""
    return numpy.frombuffer(arena, dtype=numpy.float64).reshape(ROWS, COLUMNS)


def fill(path: str) -> None:
    """Create a table and checkpoint it."""
    counter = Counter()
    # No thread may write while the memory is being protected.
    arena = pageferry.Arena(SIZE, on_pause=counter.turn.acquire, on_resume=counter.turn.release)
    table = view(arena)
    table[:] = numpy.arange(ROWS)[:, None]
    threading.Thread(target=counter.run, args=(table[-1],), daemon=True).start()
    result = pageferry.checkpoint(arena, path)
    print(f"saved {SIZE >> 20} MiB in {result.total_time:.0f} ms, paused for {result.downtime:.1f} ms")


def reopen(path: str) -> None:
    """Open a saved table and read from it."""
    begin = time.monotonic()
    arena = pageferry.restore(path)
    table = view(arena)
    seen = table[ROWS // 2, 0]
    elapsed = time.monotonic() - begin
    print(f"row {seen:.0f} read after {elapsed * 1e3:.0f} ms, with {arena.deferred >> 20} MiB deferred")
    if not (table[:-1] == numpy.arange(ROWS - 1)[:, None]).all() or len(set(table[-1])) != 1:
        raise SystemExit("the table differs from the saved one")
    print("all rows are correct")


if __name__ == "__main__":
    {"fill": fill, "open": reopen}[sys.argv[1]](sys.argv[2])
