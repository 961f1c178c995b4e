"""Counters that coroutines write to, saved and moved while they write.

    python examples/counters_asyncio.py receive 127.0.0.1:7070
    python examples/counters_asyncio.py send 127.0.0.1:7070 counters.img     # saves first, then moves

An asyncio.Lock is `on_pause`. It may be held across an await, and runs on the event loop that made the arena. While an
arena is saved or moved, the loop answers as before.

Needs numpy.
"""

from __future__ import annotations

import asyncio
import sys

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


async def work(arena: pageferry.Arena, turn: asyncio.Lock, first: int) -> None:
    """Count until the arena has moved."""
    table = view(arena)
    for number in range(first, sys.maxsize):
        async with turn:
            if arena.status == "moved":
                return
            table[number % ROWS, 0] += 1
            await asyncio.sleep(0)
            table[number % ROWS, 1] += 1


async def send(address: str, image: str) -> None:
    """Count in four tasks; save, then move."""
    turn = asyncio.Lock()
    arena = pageferry.Arena(ROWS * COLUMNS * 8, on_pause=turn)
    tasks = [asyncio.create_task(work(arena, turn, first)) for first in range(4)]
    await asyncio.sleep(0.2)
    await pageferry.checkpoint(arena, image)
    check(await asyncio.to_thread(pageferry.restore, image), "saved")
    await pageferry.migrate(arena, address)
    await asyncio.gather(*tasks)


async def receive(address: str) -> None:
    """Take the counters over."""
    arena = await pageferry.receive(address, listening=lambda where: print(f"waits at {where}", flush=True))
    check(arena, "received")


if __name__ == "__main__":
    asyncio.run({"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:]))
