"""Processes that map an arena after an operation has begun, or after the arena has been migrated."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.checkpoints.events import InstantEvent
from pageferry.errors import PageferryError, WorkloadDied, WorkloadError
from pageferry.workloads.access_page import Access, AccessPage
from pageferry.workloads.handles import attach_handle
from tests.kernel.programs import DEADLINE

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("root")


def serve_array(table: Any, orders: Any, replies: Any) -> None:
    """In a worker, write to the array of each name received. Reply with the last element of the array."""
    replies.put(list(table))
    while (name := orders.get()) is not None:
        try:
            found = table[name] if isinstance(name, str) else name
            found[:] += 1
            replies.put(int(found[-1]))
        except WorkloadError as error:
            replies.put(str(error))


def write_attached(handle: Any) -> None:
    """In a worker, attach an arena, and write to all of its pages except the first."""
    np.frombuffer(memoryview(attach_handle(handle)), "u1")[4096::4096] += 1


class Worker:
    """Process that has attached arrays."""

    def __init__(self, table: pageferry.Arrays) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self.orders, self.replies = context.Queue(), context.Queue()
        self.process = context.Process(target=serve_array, args=(table, self.orders, self.replies), daemon=True)
        self.process.start()
        self.replies.get(timeout=DEADLINE)

    def write(self, name: Any) -> Any:
        """Write to an array. Return its last element, or the error."""
        self.orders.put(name)
        return self.replies.get(timeout=DEADLINE)

    def stop(self) -> None:
        self.orders.put(None)
        self.process.join(DEADLINE)


@pytest.fixture
def table() -> pageferry.Arrays:
    return pageferry.Arrays("1MiB", capacity="64MiB")


@pytest.fixture
def worker(table: pageferry.Arrays) -> Iterator[Worker]:
    made = Worker(table)
    yield made
    made.stop()


def save_slowly(table: pageferry.Arrays, path: Path, then: Callable[[], object]) -> Any:
    """Save arrays, which takes about a second. Call a function after the snapshot point, and return its result."""
    resumed = threading.Event()

    def listen(event: object) -> None:
        if isinstance(event, InstantEvent):
            resumed.set()

    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(pageferry.checkpoint, table, path, bandwidth=8 * MIB, listener=listen)
        assert resumed.wait(DEADLINE)
        result = then()
        assert not saving.done()
        saving.result(DEADLINE)
    return result


def fill(table: pageferry.Arrays, name: str = "big") -> None:
    table[name] = np.random.default_rng(0).integers(0, 100, 8 * MIB, "u1")


def test_checkpoint_fails_if_a_worker_follows_a_growth_after_the_snapshot_point(
    table: pageferry.Arrays, worker: Worker, tmp_path: Path
) -> None:
    fill(table)
    with pytest.raises(PageferryError, match="mapped the memory during the operation"):
        save_slowly(table, tmp_path / "image", lambda: worker.write("big"))
    assert not (tmp_path / "image").exists()
    before = table["big"].copy()
    save_slowly(table, tmp_path / "image", lambda: worker.write("big"))
    assert np.array_equal(pageferry.Arrays.restore(tmp_path / "image")["big"], before)


def test_checkpoint_fails_if_a_process_attaches_after_the_snapshot_point_even_if_it_exits(
    table: pageferry.Arrays, tmp_path: Path
) -> None:
    fill(table)
    handle = table.arena.handle()
    context: Any = multiprocessing.get_context("spawn")

    def attach() -> None:
        process = context.Process(target=write_attached, args=(handle,))
        process.start()
        process.join(DEADLINE)
        assert process.exitcode == 0

    with pytest.raises(PageferryError, match="mapped the memory during the operation"):
        save_slowly(table, tmp_path / "image", attach)
    assert not (tmp_path / "image").exists()


def test_checkpoint_fails_if_a_child_is_forked_after_the_snapshot_point(
    table: pageferry.Arrays, tmp_path: Path
) -> None:
    fill(table)
    array = table["big"]

    def fork() -> None:
        child = os.fork()
        if not child:
            array[:] = 1
            os._exit(0)
        os.waitpid(child, 0)

    with pytest.raises(PageferryError, match="mapped the memory during the operation"):
        save_slowly(table, tmp_path / "image", fork)
    assert not (tmp_path / "image").exists()


def migrate(table: pageferry.Arrays) -> pageferry.Arrays:
    async def run() -> pageferry.Arrays:
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        receiving = asyncio.create_task(pageferry.receive_async("127.0.0.1:0", listening=address.set_result))
        await pageferry.migrate_async(table, await address)
        return pageferry.Arrays.over(await receiving)

    return asyncio.run(run())


def test_worker_cannot_map_memory_that_has_been_migrated(table: pageferry.Arrays, worker: Worker) -> None:
    fill(table)
    handle = table.arena.handle()
    received = migrate(table)
    last = int(received["big"][-1])
    assert "has migrated it to another process or host" in worker.write("big")
    context: Any = multiprocessing.get_context("spawn")
    process = context.Process(target=write_attached, args=(handle,))
    process.start()
    process.join(DEADLINE)
    assert process.exitcode == 1
    assert int(received["big"][-1]) == last
    received["big"][:] = 5  # the destination is a separate arena, which runs


def test_array_in_new_memory_can_be_passed_to_a_worker_that_attached_before(
    table: pageferry.Arrays, worker: Worker
) -> None:
    fill(table)
    last = int(table["big"][-1])
    assert worker.write(table["big"]) == last + 1 == int(table["big"][-1])
    assert worker.write("big") == last + 2


class Mapped:
    """Mapping that records whether it has been closed."""

    closed = False

    def close_memory(self) -> None:
        self.closed = True


def test_mapper_waits_while_the_arena_is_paused() -> None:
    page, mapped = AccessPage(), Mapped()
    page.set(Access.PAUSED)
    with ThreadPoolExecutor(1) as pool:
        mapping = pool.submit(page.map, "arena", 0, lambda: mapped)
        with pytest.raises(TimeoutError):
            mapping.result(0.1)
        page.set(Access.OPEN)
        assert mapping.result(DEADLINE) is mapped
    assert page.mark == 0
    page.trace(4096)
    page.map("arena", 4096, lambda: mapped)
    assert page.mark == 0
    page.map("arena", 0, lambda: mapped)
    assert page.mark != 0


def test_memory_that_is_handed_over_while_it_is_mapped_is_closed() -> None:
    page, mapped = AccessPage(), Mapped()

    def call() -> Mapped:
        page.set(Access.CLOSED)
        return mapped

    with pytest.raises(WorkloadError, match="has migrated it"):
        page.map("arena", 0, call)
    assert mapped.closed


def test_mapper_of_a_paused_arena_fails_when_its_owner_exits() -> None:
    page = AccessPage()
    page.set(Access.PAUSED)
    page._words[3:5] = memoryview(array("Q", [1 << 22, 1]))  # id and start time of an exited process
    with pytest.raises(WorkloadDied, match="has exited"):
        page.map("arena", 0, Mapped)
