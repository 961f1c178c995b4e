"""Checkpoint and migrate counters while several processes increment them.

    python examples/counters_processes.py receive 127.0.0.1:7070
    python examples/counters_processes.py send 127.0.0.1:7070 counters.img     # checkpoints first, then migrates

Every worker maps the memory through the descriptor of the arena, and acquires a multiprocessing lock for each step.
`on_pause` acquires that lock, so that no worker is within a step during a pause. Pageferry traces the writes of the
workers as it traces those of the program. After a migration, the mappings of the workers are read-only. Therefore
`on_moved` sets an event that ends the workers before it releases the lock.

Requires numpy.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import sys
import time
from typing import Any

import numpy

import pageferry

ROWS, COLUMNS = 256, 1024
SIZE = ROWS * COLUMNS * 8


def view(memory: Any) -> numpy.ndarray:
    """Return the counters as an array. The two halves of each row are equal between two steps."""
    return numpy.frombuffer(memory, dtype=numpy.int64).reshape(ROWS, 2, COLUMNS // 2)


def check(arena: pageferry.Arena, name: str) -> None:
    """Print whether every step is complete, and exit with 1 if not."""
    table = view(arena)
    complete = bool((table[:, 0] == table[:, 1]).all())
    print(f"{name}: {table[:, 0].sum()} additions, {'complete' if complete else 'torn'}", flush=True)
    if not complete:
        raise SystemExit(1)


def work(path: str, turn: Any, ready: Any, moved: Any, first: int) -> None:
    """Increment counters in a separate process until the arena has been migrated."""
    file = os.open(path, os.O_RDWR)
    table = view(mmap.mmap(file, SIZE))
    os.close(file)
    ready.release()
    for number in range(first, sys.maxsize):
        with turn:
            if moved.is_set():
                return
            table[number % ROWS, 0] += 1
            table[number % ROWS, 1] += 1


def send(address: str, image: str) -> None:
    """Increment counters in two processes; checkpoint, then migrate."""
    processes = multiprocessing.get_context("spawn")
    turn, ready, moved = processes.Lock(), processes.Semaphore(0), processes.Event()

    def end() -> None:
        moved.set()
        turn.release()

    arena = pageferry.Arena(SIZE, on_pause=turn.acquire, on_resume=turn.release, on_moved=end)
    path = f"/proc/{os.getpid()}/fd/{arena.fileno()}"
    workers = [processes.Process(target=work, args=(path, turn, ready, moved, first)) for first in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    time.sleep(0.2)
    pageferry.checkpoint(arena, image)
    check(pageferry.restore(image), "saved")
    pageferry.migrate(arena, address)
    for worker in workers:
        worker.join()


def receive(address: str) -> None:
    """Receive the counters and check them."""
    arena = pageferry.receive(address, listening=lambda where: print(f"listening on {where}", flush=True))
    check(arena, "received")


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:])
