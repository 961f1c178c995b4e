"""Counters that threads write to, saved and moved while they write.

    python examples/counters_threads.py receive 127.0.0.1:7070
    python examples/counters_threads.py send 127.0.0.1:7070 counters.img     # saves first, then moves

A piece of work adds 1 to both halves of a row, under a lock. The lock itself is `on_pause`: it is acquired to pause,
and released when the arena runs again or has moved. Both programs check that no piece of work was saved or moved by
half.

Needs numpy.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time

import numpy

import pageferry

ROWS, COLUMNS = 256, 1024


def view(arena: pageferry.Arena) -> numpy.ndarray:
    """The counters: halves of rows that are equal between two pieces of work."""
    return numpy.frombuffer(arena, dtype=numpy.int64).reshape(ROWS, 2, COLUMNS // 2)


def check(arena: pageferry.Arena, name: str) -> None:
    """Say whether every piece of work is there as a whole."""
    table = view(arena)
    whole = bool((table[:, 0] == table[:, 1]).all())
    print(f"{name}: {table[:, 0].sum()} additions, {'whole' if whole else 'torn'}", flush=True)
    if not whole:
        raise SystemExit(1)


def work(arena: pageferry.Arena, turn: threading.Lock, first: int) -> None:
    """Count until the arena has moved."""
    table = view(arena)
    for number in range(first, sys.maxsize):
        with turn:
            if arena.status == "moved":
                return
            table[number % ROWS, 0] += 1
            table[number % ROWS, 1] += 1


def send(address: str, image: str) -> None:
    """Count in two threads; save, then move."""
    turn = threading.Lock()
    arena = pageferry.Arena(ROWS * COLUMNS * 8, on_pause=turn)
    threads = [threading.Thread(target=work, args=(arena, turn, first)) for first in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    asyncio.run(pageferry.checkpoint(arena, image))
    check(pageferry.restore(image), "saved")
    asyncio.run(pageferry.migrate(arena, address))
    for thread in threads:
        thread.join()


def receive(address: str) -> None:
    """Take the counters over."""
    arena = asyncio.run(pageferry.receive(address, listening=lambda where: print(f"waits at {where}", flush=True)))
    check(arena, "received")


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:])
