"""Checkpoint and migrate counters while coroutines increment them.

    python examples/counters_asyncio.py receive 127.0.0.1:7070
    python examples/counters_asyncio.py send 127.0.0.1:7070 counters.img     # checkpoints first, then migrates

`on_pause` is an asyncio.Lock, which a coroutine may hold across an await. Pageferry acquires the lock on the event loop
that created the arena. The loop keeps running while the arena is checkpointed or migrated.

Requires numpy.
"""

from __future__ import annotations

import asyncio
import sys

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


async def work(arena: pageferry.Arena, turn: asyncio.Lock, first: int) -> None:
    """Increment counters until the arena has been migrated."""
    table = view(arena)
    for number in range(first, sys.maxsize):
        async with turn:
            if arena.status == "moved":
                return
            table[number % ROWS, 0] += 1
            await asyncio.sleep(0)
            table[number % ROWS, 1] += 1


async def send(address: str, image: str) -> None:
    """Increment counters in four tasks; checkpoint, then migrate."""
    turn = asyncio.Lock()
    arena = pageferry.Arena(ROWS * COLUMNS * 8, on_pause=turn)
    tasks = [asyncio.create_task(work(arena, turn, first)) for first in range(4)]
    await asyncio.sleep(0.2)
    await pageferry.checkpoint_async(arena, image)
    check(await pageferry.restore_async(image), "saved")
    await pageferry.migrate_async(arena, address)
    await asyncio.gather(*tasks)


async def receive(address: str) -> None:
    """Receive the counters and check them."""
    arena = await pageferry.receive_async(address, listening=lambda where: print(f"listening on {where}", flush=True))
    check(arena, "received")


if __name__ == "__main__":
    asyncio.run({"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:]))
