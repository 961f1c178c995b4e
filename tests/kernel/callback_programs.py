"""Program that saves or migrates its arena while tasks or threads write to the arena, and counts torn images.

Arguments: the kind of callbacks, `checkpoint` or `migrate`, and a folder. Each unit of work adds 1 to the first and to
the last word of the arena. An image is torn if the two words differ. The last line of output is `torn N of M`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np

import pageferry

SIZE = 16 << 20
ROUNDS = 8
BURST = 20
RECEIVER = """
import asyncio, numpy, pageferry
async def main():
    arena = await pageferry.receive_async("127.0.0.1:0", listening=lambda address: print(address, flush=True))
    words = numpy.frombuffer(arena, numpy.int64)
    print(int(words[0]) != int(words[-1]))
asyncio.run(main())
"""


def work(words: np.ndarray[Any, Any]) -> None:
    words[0] += 1
    for _ in range(50):
        pass
    words[-1] += 1


class Program:
    """Arena with its writers, and with the callbacks that stop the writers."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.ended = False
        self.lock: Any = asyncio.Lock() if kind.startswith("async-") else threading.Lock()
        if kind == "reentrant-lock":
            self.lock = threading.RLock()
        self.arena = pageferry.Arena(SIZE, **self.callbacks())
        self.words = np.frombuffer(memoryview(self.arena), np.int64)
        self.words[:] = 1

    def callbacks(self) -> dict[str, Any]:
        lock = self.lock

        async def pause() -> None:
            await asyncio.sleep(0)
            await lock.acquire()

        async def resume() -> None:
            lock.release()

        async def pause_threads() -> None:
            await asyncio.to_thread(lock.acquire)

        @contextlib.contextmanager
        def gate() -> Iterator[None]:
            with lock:
                yield

        @contextlib.asynccontextmanager
        async def async_gate() -> AsyncIterator[None]:
            async with lock:
                yield

        choices: dict[str, dict[str, Any]] = {
            "methods": {"on_pause": lock.acquire, "on_resume": lock.release},
            "async-methods": {"on_pause": lock.acquire, "on_resume": lock.release},
            "async-functions": {"on_pause": pause, "on_resume": resume},
            "lock": {"on_pause": lock},
            "async-lock": {"on_pause": lock},
            "reentrant-lock": {"on_pause": lock},
            "gate": {"on_pause": gate},
            "async-gate": {"on_pause": async_gate},
            "threads-async": {"on_pause": pause_threads, "on_resume": resume},
            "threads": {"on_pause": lock.acquire, "on_resume": lock.release},
        }
        return choices[self.kind]

    async def handler(self) -> None:
        for piece in itertools.count():
            if self.ended:
                return
            if isinstance(self.lock, asyncio.Lock):
                async with self.lock:
                    self.work()
                    await asyncio.sleep(0)
            else:
                with self.lock:
                    self.work()
            # A loop that never waits would hold the GIL, which a checkpoint acquires about a thousand times.
            await asyncio.sleep(0 if piece % BURST else 0.001)

    def thread(self) -> None:
        while not self.ended:
            with self.lock:
                self.work()

    def work(self) -> None:
        if self.arena.status != "moved":
            work(self.words)

    async def run(self, operation: Callable[[pageferry.Arena], Any]) -> None:
        if self.kind.startswith("threads"):
            threads = [threading.Thread(target=self.thread, daemon=True) for _ in range(2)]
            for thread in threads:
                thread.start()
            tasks = []
        else:
            tasks = [asyncio.create_task(self.handler()) for _ in range(4)]
        await asyncio.sleep(0.05)
        torn = [await operation(self.arena) for _ in range(1 if operation is move else ROUNDS)]
        self.ended = True
        for task in tasks:
            task.cancel()
        print(f"torn {sum(torn)} of {len(torn)}", flush=True)


async def save(arena: pageferry.Arena) -> bool:
    image = os.path.join(sys.argv[3], "image")
    await pageferry.checkpoint_async(arena, image)
    words = np.frombuffer(memoryview(pageferry.restore(image)), np.int64)
    return int(words[0]) != int(words[-1])


async def move(arena: pageferry.Arena) -> bool:
    receiver = await asyncio.create_subprocess_exec(sys.executable, "-c", RECEIVER, stdout=subprocess.PIPE)
    assert receiver.stdout is not None
    await pageferry.migrate_async(arena, (await receiver.stdout.readline()).decode().strip())
    return (await receiver.stdout.readline()).strip() != b"False"


async def main() -> None:
    await Program(sys.argv[1]).run(move if sys.argv[2] == "migrate" else save)
    os._exit(0)  # after a migration, writers may be blocked forever


if __name__ == "__main__":
    asyncio.run(main())
