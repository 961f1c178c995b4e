"""The engine releases the GIL in calls that take long, and when objects that take long to free are deallocated."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import pageferry
from benchmarks.python.heartbeat import Heartbeat
from pageferry._engine import Advice, Image, Mapping, PageStore, Space

SIZE = 192 << 20
"""Memory whose allocation and release take tens of milliseconds, bytes."""
PAGES = 6_000_000
"""Pages of an image whose page map takes milliseconds to read and to free."""
ATTEMPTS = 10

Call = Callable[[], object]


def longest_gap(call: Call) -> tuple[float, float]:
    """Return the duration of a call, and the longest time in it during which another thread did not run, seconds."""
    times: list[float] = []
    started, ended = threading.Event(), threading.Event()

    def run() -> None:
        started.set()
        while not ended.is_set():
            times.append(time.perf_counter())
            time.sleep(0.0005)  # without the GIL

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    begin = time.perf_counter()
    call()
    end = time.perf_counter()
    ended.set()
    thread.join()
    points = [begin, *(point for point in times if begin < point < end), end]
    return end - begin, max(later - earlier for earlier, later in pairwise(points))


def releases(prepare: Callable[[], Call]) -> bool:
    """Return whether another thread runs during a call. A busy machine may prevent that in some attempts."""
    for _ in range(ATTEMPTS):
        duration, gap = longest_gap(prepare())
        if gap < duration / 2:
            return True
    return False


def memory_file(size: int) -> int:
    file = os.memfd_create("memory")
    os.ftruncate(file, size)
    return file


def filled() -> Mapping:
    """Return memory that is allocated and mapped."""
    file = memory_file(SIZE)
    try:
        mapping = Mapping(file, SIZE)
    finally:
        os.close(file)
    Space().madvise(mapping.address, SIZE, Advice.POPULATE_WRITE)
    return mapping


@pytest.fixture(scope="module")
def image_file() -> int:
    """Return the descriptor of an image of memory without contents."""
    file = os.memfd_create("image")
    PageStore(file, secrets.token_bytes(16), [PAGES]).finish([])
    return file


def test_a_call_that_keeps_the_gil_is_detected() -> None:
    contents = bytes(SIZE)
    assert not releases(lambda: lambda: contents.count(b"1"))


def test_deallocation_of_memory_releases_the_gil() -> None:
    def prepare() -> Call:
        kept = [filled()]
        return kept.clear

    assert releases(prepare)


def test_copy_into_memory_releases_the_gil() -> None:
    contents = bytes(SIZE)

    def prepare() -> Call:
        file = memory_file(SIZE)
        mapping = Mapping(file, SIZE)
        os.close(file)
        return lambda: mapping.copy_in(0, contents)

    assert releases(prepare)


def test_classes_of_pages_release_the_gil(image_file: int) -> None:
    image = Image(image_file)
    assert releases(lambda: lambda: image.classes(0, PAGES))


def test_copied_bytes_are_in_memory() -> None:
    file = memory_file(8192)
    mapping = Mapping(file, 8192)
    os.close(file)
    mapping.copy_in(4000, memoryview(bytes(range(200)))[100:])
    assert bytes(memoryview(mapping)[3999:4101]) == bytes([0, *range(100, 200), 0])
    with pytest.raises(OSError, match="Invalid argument"):
        mapping.copy_in(8190, b"123")
    with pytest.raises(ValueError, match="contiguous"):
        mapping.copy_in(0, memoryview(b"123456")[::2])


@pytest.mark.alone
def test_event_loop_runs_during_a_checkpoint_a_load_and_a_dump(tmp_path: Path) -> None:
    async def excess(operation: Callable[[], Awaitable[object]]) -> float:
        """Return the longest gap of the heartbeat above that of an idle loop, seconds."""
        async with Heartbeat() as busy:
            begun = time.perf_counter()
            await operation()
            duration = time.perf_counter() - begun
        async with Heartbeat() as idle:
            await asyncio.sleep(duration)
        return busy.longest - idle.longest

    async def main() -> list[float]:
        arena = pageferry.Arena(128 << 20)
        np.frombuffer(memoryview(arena), np.float64)[:] = np.arange(16 << 20)
        image, kept = tmp_path / "image", list[pageferry.RestoredArena]()

        async def load() -> None:
            kept.append(await pageferry.restore_async(image))  # its end would block the loop for up to 0.1 s
            await asyncio.to_thread(kept[-1].load)

        steps: tuple[Callable[[], Awaitable[object]], ...] = (
            lambda: pageferry.checkpoint_async(arena, image),
            load,
            lambda: pageferry.dump_async(np.frombuffer(memoryview(arena), np.float64), tmp_path / "object"),
        )
        return [min([await excess(step) for _ in range(3)]) for step in steps]

    assert max(asyncio.run(main())) < 0.02
