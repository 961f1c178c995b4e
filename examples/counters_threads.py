"""Checkpoint and migrate counters while threads increment them.

    python examples/counters_threads.py receive 127.0.0.1:7070
    python examples/counters_threads.py send 127.0.0.1:7070 counters.img     # checkpoints first, then migrates

A step adds 1 to both halves of a row, under a lock. The lock itself is `on_pause`: pageferry acquires it to pause the
arena, and releases it when the arena has resumed or has been migrated. Both programs check that no step was saved or
migrated incompletely.

Requires numpy.
"""

from __future__ import annotations

import sys
import threading
import time

import numpy

import pageferry

ROWS, COLUMNS = 256, 1024


def view(arena: pageferry.Arena) -> numpy.ndarray:
    """Return the counters as an array. The two halves of each row are equal between two steps."""
    return numpy.frombuffer(arena, dtype=numpy.int64).reshape(ROWS, 2, COLUMNS // 2)


def check(arena: pageferry.Arena, name: str) -> None:
    """Print whether every step is complete, and exit with 1 if not."""
    table = view(arena)
    complete = bool((table[:, 0] == table[:, 1]).all())
    print(f"{name}: {table[:, 0].sum()} additions, {'complete' if complete else 'torn'}", flush=True)
    if not complete:
        raise SystemExit(1)


def work(arena: pageferry.Arena, turn: threading.Lock, first: int) -> None:
    """Increment counters until the arena has been migrated."""
    table = view(arena)
    for number in range(first, sys.maxsize):
        with turn:
            if arena.status == "moved":
                return
            table[number % ROWS, 0] += 1
            table[number % ROWS, 1] += 1


def send(address: str, image: str) -> None:
    """Increment counters in two threads; checkpoint, then migrate."""
    turn = threading.Lock()
    arena = pageferry.Arena(ROWS * COLUMNS * 8, on_pause=turn)
    threads = [threading.Thread(target=work, args=(arena, turn, first)) for first in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    pageferry.checkpoint(arena, image)
    check(pageferry.restore(image), "saved")
    pageferry.migrate(arena, address)
    for thread in threads:
        thread.join()


def receive(address: str) -> None:
    """Receive the counters and check them."""
    arena = pageferry.receive(address, listening=lambda where: print(f"listening on {where}", flush=True))
    check(arena, "received")


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:])
