"""Growth of arenas and of `Arrays`: the address stays, and checkpoints and migrations contain the new memory."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.errors import CheckpointError, PageferryError, UsageError, WorkloadError
from pageferry.workloads.handles import AttachedArena
from tests.kernel.programs import DEADLINE

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("root")


def words(arena: Any) -> Any:
    return np.frombuffer(memoryview(arena), "u8")


@pytest.fixture
def arena() -> pageferry.Arena:
    """Return a filled arena of 1 MiB, which can grow to 16 MiB."""
    made = pageferry.Arena(MIB, capacity="16MiB")
    words(made)[:] = 1
    return made


@pytest.mark.parametrize("large_pages", [True, False])
def test_address_and_contents_stay(large_pages: bool) -> None:
    arena = pageferry.Arena(MIB, capacity=8 * MIB, large_pages=large_pages)
    old, address = words(arena), arena.address
    old[:] = 3
    arena.resize("8MiB")
    assert (arena.address, len(arena), arena.capacity) == (address, 8 * MIB, 8 * MIB)
    assert (old == 3).all()
    assert not words(arena)[len(old) :].any()
    words(arena)[-1] = 9
    assert words(arena)[-1] == 9
    assert len(old) == MIB // 8


@pytest.mark.parametrize("size", [MIB - 4096, 17 * MIB, 0])
def test_invalid_sizes_are_refused(arena: pageferry.Arena, size: int) -> None:
    with pytest.raises(UsageError, match="invalid `size`"):
        arena.resize(size)
    assert len(arena) == MIB


def test_arena_without_capacity_cannot_grow() -> None:
    arena = pageferry.Arena(MIB)
    with pytest.raises(UsageError, match="larger `capacity`"):
        arena.resize(2 * MIB)


def test_capacity_below_the_size_is_refused(arena: pageferry.Arena, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="invalid `capacity`"):
        pageferry.Arena(MIB, capacity="512KiB")
    with pytest.raises(UsageError, match="invalid `capacity`"):
        pageferry.Arena.from_file(arena.fileno(), MIB, capacity=4096)
    with pytest.raises(UsageError, match="invalid `capacity`"):
        pageferry.Arrays("1MiB", capacity=4096)
    pageferry.checkpoint(arena, tmp_path / "image")
    with pytest.raises(UsageError, match="invalid `capacity`"):
        pageferry.restore(tmp_path / "image", capacity=4096)
    assert pageferry.Arena(5000, capacity=5000).capacity == 8192


@pytest.mark.timeout(30)
def test_receiver_refuses_an_arena_above_its_capacity(arena: pageferry.Arena) -> None:
    async def run() -> None:
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        receiving = asyncio.create_task(
            pageferry.receive_async("127.0.0.1:0", listening=address.set_result, capacity="512KiB")
        )
        with pytest.raises(PageferryError, match="invalid `capacity`"):
            await pageferry.migrate_async(arena, await address)
        receiving.cancel()  # the receiver waits for another arena
        await asyncio.wait({receiving})

    asyncio.run(run())
    words(arena)[:] = 2  # the arena runs


@pytest.mark.parametrize("method", ["grow", "replace", "permit", "keep"])
def test_methods_that_would_bypass_a_resize_are_not_available(
    arena: pageferry.Arena, method: str, tmp_path: Path
) -> None:
    pageferry.checkpoint(arena, tmp_path / "image")
    attached = AttachedArena.open(arena.handle())
    shared = pageferry.restore(tmp_path / "image", memory="shared")
    for mapping in (arena, attached, shared):
        assert not hasattr(mapping, method)


def test_child_of_a_fork_cannot_extend_the_arena(arena: pageferry.Arena) -> None:
    child = os.fork()
    if not child:
        try:
            arena.resize(2 * MIB)
        except WorkloadError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.fstat(arena.descriptor).st_size == MIB


def test_checkpoint_contains_new_memory_and_a_trace_of_the_old_size_is_not_used(
    arena: pageferry.Arena, tmp_path: Path
) -> None:
    pageferry.checkpoint(arena, tmp_path / "first", track=True)
    arena.resize(4 * MIB)
    words(arena)[-1] = 5
    with pytest.raises(PageferryError):
        pageferry.checkpoint(arena, tmp_path / "child", parent=tmp_path / "first")
    pageferry.checkpoint(arena, tmp_path / "second", track=True)
    words(arena)[MIB // 8] = 6
    pageferry.checkpoint(arena, tmp_path / "third", parent=tmp_path / "second")
    restored = pageferry.restore(tmp_path / "third", capacity=8 * MIB)
    assert np.array_equal(words(restored), words(arena))
    restored.resize(8 * MIB)
    words(restored)[-1] = 7
    assert restored.deferred == 0
    restored.ensure(0, 8 * MIB)
    pageferry.checkpoint(restored, tmp_path / "fourth")
    assert np.array_equal(words(pageferry.restore(tmp_path / "fourth")), words(restored))


def test_resize_during_a_checkpoint_makes_the_checkpoint_fail(tmp_path: Path) -> None:
    made: list[pageferry.Arena] = []

    def on_pause() -> None:
        while made:  # before the first pause, after the regions were read
            made.pop().resize(2 * MIB)

    arena = pageferry.Arena(MIB, capacity=4 * MIB, on_pause=on_pause)
    made.append(arena)
    with pytest.raises((CheckpointError, WorkloadError), match="was resized during the operation"):
        pageferry.checkpoint(arena, tmp_path / "image")
    assert not (tmp_path / "image").exists()
    pageferry.checkpoint(arena, tmp_path / "image")
    assert len(pageferry.restore(tmp_path / "image")) == 2 * MIB


def test_growth_with_the_lock_of_the_pause_does_not_wait_for_the_pause(tmp_path: Path) -> None:
    turn, waits = threading.Lock(), threading.Event()

    def pause() -> None:
        waits.set()
        turn.acquire()

    table = pageferry.Arrays("1MiB", capacity="64MiB", on_pause=pause, on_resume=turn.release, direct_io=False)
    with ThreadPoolExecutor(2) as pool:
        with turn:
            saving = pool.submit(pageferry.checkpoint, table, tmp_path / "image")
            assert waits.wait(DEADLINE)
            growing = pool.submit(table.__setitem__, "big", np.zeros(4 * MIB, "u1"))
            grown = futures.wait([growing], 10).done
        with pytest.raises((CheckpointError, WorkloadError), match="was resized during the operation"):
            saving.result(DEADLINE)
        growing.result(DEADLINE)
    assert grown
    pageferry.checkpoint(table, tmp_path / "image")
    assert len(pageferry.Arrays.restore(tmp_path / "image")["big"]) == 4 * MIB


@pytest.mark.timeout(30)  # a growth that waits blocks the loop
def test_growth_in_a_coroutine_with_the_lock_of_the_pause_does_not_wait_for_the_pause(tmp_path: Path) -> None:
    async def run() -> None:
        turn, waits = asyncio.Lock(), asyncio.Event()

        async def pause() -> None:
            waits.set()
            await turn.acquire()

        table = pageferry.Arrays("1MiB", capacity="64MiB", on_pause=pause, on_resume=turn.release, direct_io=False)
        async with turn:
            saving = asyncio.create_task(pageferry.checkpoint_async(table, tmp_path / "image"))
            await waits.wait()
            table["big"] = np.zeros(4 * MIB, "u1")
        with pytest.raises((CheckpointError, WorkloadError), match="was resized during the operation"):
            await saving

    asyncio.run(asyncio.wait_for(run(), DEADLINE))


def test_grown_arena_is_migrated(arena: pageferry.Arena) -> None:
    async def run() -> tuple[int, int, int]:
        arena.resize(4 * MIB)
        words(arena)[-1] = 11
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        receiving = asyncio.create_task(
            pageferry.receive_async("127.0.0.1:0", listening=address.set_result, capacity="8MiB")
        )
        await pageferry.migrate_async(arena, await address)
        received = await receiving
        assert arena.status == "moved"
        received.resize(8 * MIB)
        words(received)[-1] = 12
        found = words(received)
        return int(found[0]), int(found[4 * MIB // 8 - 1]), int(found[-1])

    assert asyncio.run(run()) == (1, 11, 12)


def test_child_of_a_fork_keeps_its_size(arena: pageferry.Arena) -> None:
    child = os.fork()
    if not child:
        os._exit(0 if len(arena) == MIB and (words(arena) == 1).all() else 1)
    arena.resize(2 * MIB)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_arrays_grow_up_to_the_capacity(tmp_path: Path) -> None:
    table = pageferry.Arrays("1MiB", capacity="8MiB")
    first = table.zeros("first", 1000)
    table["large"] = np.arange(500_000)
    assert MIB < len(table.arena) <= 8 * MIB
    first[0] = 4
    assert table["first"][0] == 4
    table.resize("first", 100_000)
    with pytest.raises(UsageError, match="cannot add an array"):
        table.empty("huge", 4 * MIB)
    assert len(table.arena) == 8 * MIB
    pageferry.checkpoint(table, tmp_path / "image")
    again = pageferry.Arrays.restore(tmp_path / "image", capacity="16MiB")
    again["more"] = np.ones(4 * MIB // 8)
    assert np.array_equal(again["large"], np.arange(500_000))
    assert len(again.arena) > 8 * MIB


def read_when_added(table: Any, ready: Any, added: Any, result: Any) -> None:
    """In a worker, report the sum of the array `new` when the array has been added."""
    assert "new" not in table
    ready.set()
    assert added.wait(DEADLINE)
    result.put(int(table["new"].sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_attached_process_follows_the_growth(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    table = pageferry.Arrays("1MiB", capacity="8MiB")
    ready, added, result = context.Event(), context.Event(), context.Queue()
    worker = context.Process(target=read_when_added, args=(table, ready, added, result))
    worker.start()
    assert ready.wait(DEADLINE)
    table["new"] = np.ones(500_000, "i8")
    added.set()
    assert result.get(timeout=DEADLINE) == 500_000
    worker.join(DEADLINE)
