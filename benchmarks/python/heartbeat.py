"""Longest gap of the heartbeat of an event loop during operations, compared with that of an idle loop.

`python -m benchmarks.python.heartbeat FOLDER SIZE` measures in its own process, and prints the runs as JSON.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

import pageferry
from benchmarks.harness.bench import Setting

FULL, SMALL = 8 << 30, 64 << 20
"""Size of the arena, bytes. The arena and its image need twice as much memory if the folder is on tmpfs."""
INTERVAL = 0.001
"""Interval of the heartbeat, seconds."""
STEP = 1 << 27
"""Bytes of the arena that are filled at once."""


class Heartbeat:
    """Coroutine that runs every millisecond in the event loop, and the longest time between two of its runs."""

    longest = 0.0
    """Longest gap, seconds."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.sleep(2 * INTERVAL)  # a gap until the end of the operation counts
        self._task.cancel()

    async def _beat(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(INTERVAL)
            now = time.perf_counter()
            self.longest = max(self.longest, now - last)
            last = now


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Save and load an arena while a heartbeat runs in the event loop of the program."""
    size = SMALL if setting.quick else FULL
    command = [sys.executable, "-m", "benchmarks.python.heartbeat", str(setting.folder), str(size)]
    runs: list[dict[str, Any]] = []
    for _ in range(setting.repetitions):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs += json.loads(done.stdout)
    return runs


async def observed(name: str, operation: Callable[[], Awaitable[object]]) -> tuple[dict[str, Any], Any]:
    """Return the gaps of the heartbeat during an operation and during an idle time of equal length, and the result of
    the operation."""
    async with Heartbeat() as busy:
        begun = time.perf_counter()
        result = await operation()
        seconds = time.perf_counter() - begun
    async with Heartbeat() as idle:
        await asyncio.sleep(seconds)
    run = {
        "operation": name,
        "duration-ms": seconds * 1e3,
        "gap-ms": busy.longest * 1e3,
        "idle-ms": idle.longest * 1e3,
        "excess-ms": (busy.longest - idle.longest) * 1e3,
    }
    return run, result


def filled(size: int) -> pageferry.Arena:
    """Return an arena with random contents."""
    arena = pageferry.Arena(size)
    contents, random = np.frombuffer(memoryview(arena), np.float64), np.random.default_rng(1)
    for start in range(0, len(contents), STEP // 8):
        part = contents[start : start + STEP // 8]
        random.random(len(part), out=part)
    return arena


async def main(folder: Path, size: int) -> None:
    """Save and load an arena, and print the gaps."""
    image, arenas = folder / "heartbeat", [filled(size)]
    saved, _ = await observed("checkpoint", lambda: pageferry.checkpoint_async(arenas[0], image))
    arenas.clear()  # its memory is freed outside of the measurement

    async def load() -> pageferry.Arena:
        arena = await pageferry.restore_async(image)
        await asyncio.to_thread(arena.load)
        return arena

    loaded, _ = await observed("restore and load", load)
    print(json.dumps([saved, loaded]))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
