"""Program with an arena into which a thread reads from a disk by direct I/O, which bypasses page tables.

`source NAME DISK MEANS [base-pages]`: MEANS is `thread` (O_DIRECT), `ring` (io_uring) or `fixed` (io_uring, into a
registered buffer). With `base-pages` the arena has no huge pages: a huge page with a pinned page cannot be split.
`on_pause` waits until no read is in flight. Commands on standard input:

- `read`: read 64 KiB at offset 1 MiB of the disk into the buffer
- `look`: print `fresh` if the buffer holds the contents of the disk, otherwise `stale`
- `clear`: fill the buffer with zeros

`destination` receives an arena, and prints `fresh` or `stale`. `late-destination` also accepts a post-copy migration,
and waits until all pages are present before it prints.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading

import pageferry
from pageferry.host.registry import Registry
from pageferry.migration.destination import Destination
from pageferry.migration.incoming import ReceivingHost
from pageferry.migration.ownership import CommitDecisions
from pageferry.migration.receiving import ListenOptions, arena_for
from pageferry.migration.transport import messages
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.protocols import Migratable
from tests.slow_disk import HELD, contents
from tests.uring import Ring

SIZE = 8 << 20
AT, LENGTH = 1 << 20, 64 << 10
"""Offset and length of the buffer in the arena, bytes."""


def say(line: str) -> None:
    print(line, flush=True)


class Reader:
    def __init__(self, name: str, disk: str, means: str, pages: str = "huge-pages") -> None:
        self.idle = threading.Condition()
        self.reading = False
        self.paused = False
        large = pages != "base-pages"
        self.arena = pageferry.Arena(SIZE, name, on_pause=self.pause, on_resume=self.resume, large_pages=large)
        view = memoryview(self.arena)
        view[:] = b"S" * SIZE
        self.target = view[AT : AT + LENGTH]
        self.means = means
        self.file = os.open(disk, os.O_RDONLY | os.O_DIRECT)
        self.ring = Ring() if means != "thread" else None
        if self.ring is not None and means == "fixed":
            self.ring.register(self.arena.address + AT, LENGTH)

    def start(self) -> None:
        with self.idle:
            self.idle.wait_for(lambda: not self.paused)
            self.reading = True
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        if self.ring is None:
            got = os.preadv(self.file, [self.target], HELD)
        else:
            got = self.ring.read(self.file, self.arena.address + AT, LENGTH, HELD, fixed=self.means == "fixed")
        with self.idle:
            self.reading = False
            self.idle.notify_all()
        say(f"read {got}")

    def pause(self) -> None:
        with self.idle:
            self.paused = True
            self.idle.wait_for(lambda: not self.reading)

    def resume(self) -> None:
        with self.idle:
            self.paused = False
            self.idle.notify_all()


def is_fresh(memory: memoryview) -> str:
    return "fresh" if memory[AT : AT + LENGTH] == contents(HELD, LENGTH) else "stale"


def source(name: str, disk: str, means: str, *pages: str) -> None:
    reader = Reader(name, disk, means, *pages)
    say("ready")
    for line in sys.stdin:
        match line.strip():
            case "read":
                reader.start()
            case "clear":
                reader.target[:] = bytes(LENGTH)
                say("cleared")
            case "look":
                say(is_fresh(memoryview(reader.arena)))


async def destination() -> None:
    arena = await pageferry.receive_async("127.0.0.1:0", listening=lambda address: say(address))
    say(is_fresh(memoryview(arena)))


async def late_destination() -> None:
    """Receive an arena. Unlike `pageferry.receive`, also accept post-copy."""
    arenas: list[Arena] = []

    async def prepare(hello: messages.Hello) -> Migratable:
        fresh = arena_for(hello)
        arenas.append(Arena.from_file(fresh.descriptor, fresh.length, private=True))
        return arenas[0].workload()

    connections = ListenOptions().open("127.0.0.1:0")
    say(str(connections.address))
    destination = Destination(connections, prepare, ReceivingHost(decisions=CommitDecisions(Registry().path)))
    await destination.run()
    await destination.report()
    say(is_fresh(memoryview(arenas[0])))
    destination.close()
    await connections.close()


if __name__ == "__main__":
    match sys.argv[1]:
        case "source":
            source(*sys.argv[2:])
        case "destination":
            asyncio.run(destination())
        case "late-destination":
            asyncio.run(late_destination())
