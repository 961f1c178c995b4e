"""Arenas and arrays that other processes open by name or receive as pickles (multiprocessing, joblib)."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.errors import NoSuchWorkload, UsageError, WorkloadDied, WorkloadError
from pageferry.workloads.handles import AttachedArena, attach_handle
from tests.kernel.programs import DEADLINE
from tests.kernel.sharing_children import count_up, fill, returned, total

METHODS = ["spawn", "forkserver", "fork"]


def make(kind: str) -> Any:
    if kind == "arena":
        return pageferry.Arena(1 << 20)
    table = pageferry.Arrays("1MiB")
    array = table.zeros("x", 100, "i4")
    return table if kind == "arrays" else array


def first(shared: Any) -> int:
    match shared:
        case pageferry.Arrays():
            return int(shared["x"][0])
        case np.ndarray():
            return int(shared[0])
        case _:
            return int.from_bytes(memoryview(shared)[:4], "little")


@pytest.mark.parametrize("kind", ["arena", "arrays", "array"])
@pytest.mark.parametrize("method", METHODS)
def test_worker_of_a_pool_writes_to_the_same_memory(method: str, kind: str) -> None:
    shared = make(kind)
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        pid, name = pool.submit(fill, shared, 7).result(DEADLINE)
        assert pid != os.getpid()
        arena = "Arena" if method == "fork" else "AttachedArena"  # a forked worker has inherited the arena
        assert name == {"arena": arena, "arrays": "Arrays", "array": "ndarray"}[kind]
        assert first(shared) == 7
        if kind != "array":
            assert pool.submit(returned, shared).result(DEADLINE) is shared


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_argument_of_a_process_is_shared(method: str) -> None:
    table = make("arrays")
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=fill, args=(table, 5))
    process.start()
    process.join(DEADLINE)
    assert process.exitcode == 0
    assert first(table) == 5


def limit_addresses(length: int) -> None:
    """Limit the address space of a worker to `length` bytes more than it uses."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + length, resource.RLIM_INFINITY))


def test_worker_without_addresses_for_growth_attaches_the_memory_that_exists() -> None:
    arena = pageferry.Arena(1 << 20, capacity="1TiB")
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=limit_addresses, initargs=(4 << 30,)
    ) as pool:
        pool.submit(fill, arena, 7).result(DEADLINE)
    assert first(arena) == 7


tables: list[Any] = []
"""Tables that this worker has received."""


def sum_of(name: str, *given: Any) -> int:
    """In a worker, return the sum of an array in the table `given`, or in the last table that was given."""
    tables.extend(given)
    return int(tables[-1][name].sum())


def test_worker_without_addresses_for_growth_names_the_limit() -> None:
    table = pageferry.Arrays("1MiB", capacity="1TiB")
    table["a"] = np.ones(5, "i8")
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=limit_addresses, initargs=(4 << 30,)
    ) as pool:
        assert pool.submit(sum_of, "a", table).result(DEADLINE) == 5
        table["b"] = np.ones(1 << 20, "i8")
        with pytest.raises(WorkloadError, match="raise the limit of the address space"):
            pool.submit(sum_of, "b").result(DEADLINE)


def test_worker_without_addresses_for_the_memory_names_the_limit() -> None:
    file = os.memfd_create("large")
    os.ftruncate(file, 1 << 46)
    found = resource.getrlimit(resource.RLIMIT_AS)
    limit_addresses(1 << 30)
    try:
        with pytest.raises(WorkloadError, match="raise the limit of the address space"):
            AttachedArena(file, 1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, found)
        os.close(file)


def test_worker_of_joblib_writes_to_the_same_memory() -> None:
    joblib = pytest.importorskip("joblib")
    table = make("arrays")
    pid, name = joblib.Parallel(n_jobs=2)(joblib.delayed(fill)(table, 9) for _ in range(1))[0]
    assert (first(table), name) == (9, "Arrays")
    assert pid != os.getpid()


def test_views_of_arrays_are_shared_as_they_are() -> None:
    table = pageferry.Arrays("1MiB")
    table["x"] = np.arange(100.0).reshape(10, 10)
    view = table["x"][::-2, 3:5].T
    view.flags.writeable = False
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(total, view).result(DEADLINE)[1:] == (float(view.sum()), False)
        again = pool.submit(returned, view).result(DEADLINE)
        assert np.shares_memory(again, view)
        outside = np.arange(5)
        assert not np.shares_memory(pool.submit(returned, outside).result(DEADLINE), outside)


@pytest.mark.parametrize("mode", ["r", "c", "w"])
def test_arrays_of_a_loaded_object_are_shared_unless_private(mode: Any, tmp_path: Path) -> None:
    pageferry.dump({"x": np.arange(1000)}, tmp_path / "image")
    found = pageferry.load(tmp_path / "image", mode, prefetch=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(total, found["x"]).result(DEADLINE)
        assert result[1:] == (499500.0, mode != "r")
        again = pool.submit(returned, found).result(DEADLINE)
    assert np.shares_memory(again["x"], found["x"]) is (mode != "c")


@pytest.mark.parametrize("call", [pickle.dumps, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", ["arena", "arrays"])
def test_other_pickles_are_refused(kind: str, call: Callable[[Any], object]) -> None:
    shared = make(kind)
    with pytest.raises(UsageError, match="a handle is valid only on this host"):
        call(shared)


def test_handle_of_a_dead_owner_is_refused() -> None:
    code = (
        "import sys, pageferry, multiprocessing.reduction\n"
        "arena = pageferry.Arena(4096)\n"
        "sys.stdout.buffer.write(multiprocessing.reduction.ForkingPickler.dumps(arena))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=DEADLINE, check=True)
    with pytest.raises(WorkloadDied, match="has exited"):
        pickle.loads(done.stdout)


def test_handle_of_another_file_is_refused() -> None:
    arena, other = pageferry.Arena(4096), pageferry.Arena(4096)
    handle = arena.handle()
    wrong = type(handle)(**{name: getattr(handle, name) for name in handle.__struct_fields__} | {"inode": 1})
    with pytest.raises(WorkloadError, match="refers to another file"):
        attach_handle(wrong)
    assert attach_handle(other.handle()) is other


def test_operations_on_attached_memory_are_refused_by_name(tmp_path: Path) -> None:
    table = make("arrays")
    attached = AttachedArena.open(table.arena.handle())
    with pytest.raises(WorkloadError, match=f"process {os.getpid()}"):
        pageferry.checkpoint(attached, tmp_path / "image")  # type: ignore[arg-type]  # an error of the caller


def owner(name: str) -> subprocess.Popen[str]:
    """Start a program whose arrays other processes can open by name."""
    code = (
        "import sys, pageferry\n"
        "table = pageferry.Arrays('1MiB', sys.argv[1], on_pause=lambda: None, on_resume=lambda: None)\n"
        "table.zeros('x', 100, 'i4')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(table['x'][0], flush=True)\n"
        "table.close()\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    return program


def test_arena_is_attached_by_name() -> None:
    program = owner("attached")
    try:
        found = pageferry.Arrays.over(pageferry.attach("attached"))
        found["x"][0] = 11
        assert pageferry.attach("attached") is found.arena
        with pytest.raises(WorkloadError, match="cannot change the arrays"):
            found["y"] = np.zeros(3)
        output, _ = program.communicate("\n", timeout=DEADLINE)
        assert output == "11\n"
    finally:
        program.kill()
        program.wait()
    with pytest.raises(NoSuchWorkload):
        pageferry.attach("attached")


def test_arena_is_attached_by_name_in_its_own_process() -> None:
    async def main() -> None:
        with pageferry.Arena(4096, "own", on_pause=lambda: None) as arena:
            assert await pageferry.attach_async("own") is arena

    asyncio.run(main())


# -- writers


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_checkpoint_traces_attached_processes(method: str, tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context(method)
    going, ready = context.Event(), context.Event()
    going.set()
    table = pageferry.Arrays("8MiB")
    table.zeros("x", 1 << 20, "i4")
    process = context.Process(target=count_up, args=(table, going, ready))
    process.start()
    try:
        assert ready.wait(DEADLINE)
        assert isinstance(table.arena, pageferry.Arena)
        pids = {segment.pid for segment in table.arena.workload().regions[0].segments}
        assert pids == {os.getpid(), process.pid}
        pageferry.checkpoint(table, tmp_path / "first.img", track=True)
        going.clear()
        process.join(DEADLINE)
        pageferry.checkpoint(table, tmp_path / "second.img", parent=tmp_path / "first.img")
    finally:
        going.clear()
        process.join(DEADLINE)
    saved = pageferry.Arrays.restore(tmp_path / "first.img")["x"]
    assert int(saved[0]) - int(saved[-1]) in (0, 1)
    saved = pageferry.Arrays.restore(tmp_path / "second.img")["x"]
    assert saved[0] == saved[-1] == table["x"][0] > 0
    assert saved.tobytes() == table["x"].tobytes()


def test_process_attached_by_name_is_a_known_writer() -> None:
    code = (
        "import sys, pageferry\narena = pageferry.attach('known')\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    )
    with pageferry.Arena(1 << 20, "known", on_pause=lambda: None) as arena:
        program = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == b"ready\n"
            assert {segment.pid for segment in arena.workload().regions[0].segments} == {os.getpid(), program.pid}
            assert arena.handed_out
        finally:
            program.communicate(b"\n", timeout=DEADLINE)
