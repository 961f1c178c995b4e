"""Programs that migrate and receive an arena from Python, controlled by commands on standard input.

`source SIZE WORDS...` creates an arena of SIZE bytes. WORDS:

- `writing`: a thread writes continuously
- `sparse`: the program writes to three pages
- `memfd`: the arena has no huge pages
- `collapsed`: the program collapses the memory into huge pages
- `stateful`: the arena has state callbacks
- `named`: the arena is registered as `mover`

Commands of the source:

- `migrate ADDRESS`: migrate the arena
- `briefly ADDRESS`: start a migration, and cancel it after the next line of input
- `had`: print hashes of memory and state
- `calls`: print the callbacks that were called
- `descriptors`: print the number of open descriptors

`destination WORDS...` receives an arena, prints hashes of memory and state, and writes to the arena after the next line
of input. WORDS: `stateful`, and `small` (the destination accepts at most 16 MiB).
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import sys
import threading
import time
from typing import Any

import msgspec
import numpy as np

import pageferry
from pageferry.errors import PageferryError

PAGE = 4096


def say(what: object) -> None:
    print(json.dumps(what), flush=True)


class Program:
    """Common part of source and destination: a state, and callbacks that record each call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.may_run = threading.Event()
        self.parked = threading.Event()
        self.state = b""

    def callbacks(self, stateful: bool) -> dict[str, Any]:
        state = (lambda: self.state, self.load) if stateful else None
        return {
            "on_pause": self.pause,
            "on_resume": self.resume,
            "on_moved": lambda: self.calls.append("moved"),
            "state": state,
            "direct_io": False,
        }

    def load(self, state: bytes) -> None:
        self.state = state
        self.calls.append("loaded")

    def pause(self) -> None:
        self.calls.append("paused")
        if self.may_run.is_set():
            self.may_run.clear()
            self.parked.wait()

    def resume(self) -> None:
        self.calls.append("resumed")
        self.parked.clear()
        self.may_run.set()

    def had(self, arena: pageferry.Arena) -> dict[str, object]:
        digest = hashlib.blake2b()
        for start, end in arena.data_ranges():
            digest.update(memoryview(arena)[start:end])
        empty = not any(memoryview(arena)[:PAGE]) if arena.data_ranges() else True
        content = digest.hexdigest() if not empty else ""
        return {
            "size": len(arena),
            "calls": self.calls,
            "digest": content,
            "state": hashlib.blake2b(self.state).hexdigest(),
        }


class Source(Program):
    def __init__(self, size: int, how: set[str]) -> None:
        super().__init__()
        self.arena = pageferry.Arena(
            size,
            "mover" if "named" in how else None,
            large_pages="memfd" not in how,
            **self.callbacks("stateful" in how),
        )
        self.words = np.frombuffer(memoryview(self.arena), dtype=np.uint64)
        self.state = os.urandom(3 << 20) if "stateful" in how else b""
        if "sparse" in how:
            self.words[[0, size // 16, size // 8 - 1]] = 4711
        if "writing" in how:
            self.words[:] = np.random.default_rng(7).integers(1, 1 << 60, self.words.size)
            self.may_run.set()
            threading.Thread(target=self.write, daemon=True).start()
        if "collapsed" in how:
            self.arena.collapse()

    def write(self) -> None:
        random = np.random.default_rng(11)
        while True:
            if not self.may_run.is_set():
                self.parked.set()
                self.may_run.wait()
            where = random.integers(0, self.words.size, 4)
            self.words[where] += 1
            time.sleep(1e-5)  # yields the GIL to the other threads

    async def migrate(self, address: str) -> None:
        try:
            result = await pageferry.migrate_async(self.arena, address, max_rounds=100)
        except PageferryError as error:
            say({type(error).__name__: str(error)})
            return
        say(msgspec.to_builtins(result))
        say(self.had(self.arena))

    async def migrate_briefly(self, address: str) -> None:
        """Start a migration, and cancel it after the next line of input, as a timeout in a program would."""
        try:
            async with asyncio.timeout(None) as limit:
                telling = asyncio.create_task(self.give_up(limit))
                await pageferry.migrate_async(self.arena, address)
                await telling
        except TimeoutError:
            say("gave up")
            before = self.words.copy()
            await asyncio.to_thread(self.wait_for_writes, before)
            say(self.calls)

    async def give_up(self, limit: asyncio.Timeout) -> None:
        await asyncio.to_thread(sys.stdin.readline)
        limit.reschedule(asyncio.get_running_loop().time())

    def wait_for_writes(self, before: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        while (before == self.words).all():
            time.sleep(0.001)

    def run(self) -> None:
        for line in sys.stdin:
            match line.split():
                case ["briefly", address]:
                    asyncio.run(self.migrate_briefly(address))
                case ["migrate", address]:
                    asyncio.run(self.migrate(address))
                case ["had"]:
                    say(self.had(self.arena))
                case ["calls"]:
                    say(self.calls)
                case ["descriptors"]:
                    gc.collect()
                    say(len(os.listdir("/proc/self/fd")))


class Destination(Program):
    async def run(self, how: set[str]) -> None:
        arena = await pageferry.receive_async(
            "127.0.0.1:0",
            listening=lambda address: say({"address": address}),
            max_size=16 << 20 if "small" in how else None,
            **self.callbacks("stateful" in how),
        )
        allocated = os.fstat(arena.fileno()).st_blocks * 512
        state = self.state or arena.received_state or b""
        self.state = state
        say({**self.had(arena), "allocated": allocated})
        await asyncio.to_thread(sys.stdin.readline)
        memoryview(arena)[len(arena) - 1] = 77
        say({"written": memoryview(arena)[len(arena) - 1] == 77})


def main() -> None:
    if sys.argv[1] == "source":
        Source(int(sys.argv[2]), set(sys.argv[3:])).run()
    else:
        how = set(sys.argv[2:])
        asyncio.run(Destination().run(how))


if __name__ == "__main__":
    main()
