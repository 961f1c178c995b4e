"""Images whose memory is shared by several processes of a host: one base, private writes, one pager (S10)."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.errors import ImageError, RestoreError, UnsupportedError, UsageError
from pageferry.host import proc
from pageferry.host.registry import Registry
from pageferry.host.smaps import smaps
from pageferry.pager import base_client, base_records
from pageferry.workloads.arena.shared import SharedArena
from pageferry.workloads.bases import describe_bases
from tests.kernel import users
from tests.kernel.moving import environment
from tests.kernel.programs import DEADLINE, Program, wait_until

MIB = 1 << 20
COUNT = 4 * MIB // 8
READER = ("-m", "tests.kernel.shared_reader")

root = pytest.mark.usefixtures("root")


@pytest.fixture(autouse=True)
def run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Registry]:
    """Yield the registry of a separate run directory, which must be empty again after the test."""
    monkeypatch.setenv("PAGEFERRY_RUN_DIR", str(tmp_path / "run"))
    registry = Registry()
    yield registry
    gc.collect()
    wait_until(lambda: not base_records.base_folders(registry), "the exit of the pager")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return the path of an image of two arrays of 4 MiB each: `x`, which contains 0, 1, 2, ..., and `zeros`."""
    path = tmp_path / "object.img"
    pageferry.dump({"x": np.arange(COUNT), "zeros": np.zeros(COUNT)}, path)
    return path


def pager_of(registry: Registry) -> int:
    """Return the process id of the pager of the only base."""
    [folder] = base_records.base_folders(registry)
    record = folder.load()
    assert record is not None
    return record.pager


@root
def test_memory_is_loaded_on_demand_and_writes_are_private(image: Path, run_directory: Registry) -> None:
    first = pageferry.load(image, "c", memory="shared", prefetch=False)
    second = pageferry.load(image, "c", memory="shared", prefetch=False)
    [base] = describe_bases()
    assert base.pager == pager_of(run_directory)
    assert base.clones == [f"process-{os.getpid()}-{name.split('-')[-1]}" for name in base.clones]
    assert len(base.clones) == 2
    assert base.deferred > 0
    first["x"][7] = 1000
    assert (first["x"][7], second["x"][7]) == (1000, 7)
    assert np.array_equal(second["x"], np.arange(COUNT))
    assert not second["zeros"].any()
    assert describe_bases()[0].deferred == 0


@root
def test_arena_reports_its_state_and_refuses_what_it_cannot_do(image: Path) -> None:
    arena = pageferry.restore(image, memory="shared", prefetch=False)
    assert isinstance(arena, SharedArena)
    assert arena.eager_reason is None
    assert 0 < arena.deferred <= arena.length
    arena.ensure(arena.length - 1, 1)
    arena.load()
    assert arena.deferred == 0
    with pytest.raises(UsageError, match="invalid range"):
        arena.ensure(1, arena.length)
    with pytest.raises(UnsupportedError, match="its pages are private"):
        arena.fileno()
    with pytest.raises(UsageError, match="changes are private"):
        pickle.dumps(arena)
    with pytest.raises(UnsupportedError, match="its changes are private"):
        pageferry.checkpoint(arena, image.with_name("other.img"))  # type: ignore[arg-type]


OPTIONS: list[dict[str, Any]] = [
    {"name": "x", "on_pause": print},
    {"on_pause": print},
    {"on_resume": print},
    {"direct_io": False},
    {"loop": asyncio.new_event_loop()},
    {"capacity": "1G"},
]


@pytest.mark.parametrize("given", OPTIONS, ids=lambda given: next(iter(given)))
def test_options_of_arenas_that_can_be_saved_are_refused(image: Path, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be combined with shared `memory`"):
        asyncio.run(pageferry.restore_async(image, memory="shared", **given))
    with pytest.raises(UsageError, match="cannot be combined with shared `memory`"):
        pageferry.restore(image, memory="shared", **given)
    with pytest.raises(UsageError, match=r"mode. w cannot be combined"):
        pageferry.load(image, "w", memory="shared")


@root
def test_four_workers_hold_the_memory_once(tmp_path: Path) -> None:
    path, count = tmp_path / "large.img", 256 * MIB // 8
    pageferry.dump({"x": np.arange(count)}, path)
    with ExitStack() as stack:
        workers = [stack.enter_context(Program(*READER, str(path))) for _ in range(4)]
        sizes = []
        for worker in workers:
            assert worker.json() == {"eager": 0}
        for worker in workers:
            worker.say("sum")
            assert worker.json() == count * (count - 1) // 2
            worker.say("pss")
            sizes.append(worker.json())
        for worker in workers:
            worker.say("pss")
        total = sum(worker.json() for worker in workers)
    assert sizes[0] >= 0.99 * 256 * MIB  # all processes have mapped the first huge page, which contains the pickle
    assert total <= 1.1 * sizes[0]


@root
def test_next_process_takes_over_after_the_pager_was_killed(image: Path, run_directory: Registry) -> None:
    with Program(*READER, str(image), "c") as waiting:
        waiting.json()
        waiting.say("write 0")
        waiting.json()
        os.kill(killed := pager_of(run_directory), signal.SIGKILL)
        waiting.say(f"read {COUNT - 1}")  # waits for the next pager
        with Program(*READER, str(image)) as other:
            other.json()
            assert waiting.json() == COUNT - 1
            assert pager_of(run_directory) != killed
            other.say("read 0")
            assert other.json() == 0
        waiting.say("sum")
        assert waiting.json() == COUNT * (COUNT - 1) // 2 + 1


@root
def test_command_and_the_program_itself_take_over(image: Path, run_directory: Registry) -> None:
    arena = pageferry.restore(image, memory="shared", prefetch=False)
    os.kill(first := pager_of(run_directory), signal.SIGKILL)
    wait_until(lambda: proc.start_time(first) is None, "the end of the pager")
    with pytest.raises(RestoreError, match="starts another pager"):
        arena.deferred  # noqa: B018
    [base] = describe_bases()
    assert (base.pager, base.stall_reason is not None) == (None, True)
    command = [sys.executable, "-m", "pageferry", "restore", "--takeover", base.clones[0]]
    done = subprocess.run([*command, "--output", "json"], check=True, capture_output=True, timeout=DEADLINE)
    second = json.loads(done.stdout.splitlines()[-1])["pager"]
    assert second == pager_of(run_directory) != first
    os.kill(second, signal.SIGKILL)
    arena.load()
    assert pager_of(run_directory) not in (first, second)
    assert np.array_equal(np.frombuffer(memoryview(arena), "i8")[-COUNT:], np.zeros(COUNT))


@root
def test_coroutine_restores_shared_memory(image: Path) -> None:
    arena = asyncio.run(pageferry.restore_async(image, memory="shared"))
    assert isinstance(arena, SharedArena)


@root
def test_many_programs_threads_and_coroutines_load_at_the_same_time(image: Path) -> None:
    async def load() -> list[Any]:
        one = [pageferry.load_async(image, memory="shared", prefetch=False) for _ in range(35)]
        other = [pageferry.restore_async(image, memory="shared", prefetch=False) for _ in range(35)]
        return await asyncio.wait_for(asyncio.gather(*one, *other), DEADLINE)

    assert asyncio.run(load())[0]["x"][7] == 7


@root
def test_killed_program_leaves_nothing_behind(image: Path, run_directory: Registry) -> None:
    with Program(*READER, str(image)) as program:
        program.json()
        assert base_records.base_folders(run_directory)
        program.kill()
        wait_until(lambda: not base_records.base_folders(run_directory), "the exit of the pager")


@root
@pytest.mark.parametrize("point", ["base.published", "shared.joined"])
def test_kill_during_the_start_leaves_nothing_and_the_next_process_succeeds(
    image: Path, run_directory: Registry, point: str
) -> None:
    done = subprocess.run(
        [sys.executable, *READER, str(image)], env=environment(f"{point}=kill"), capture_output=True, timeout=DEADLINE
    )
    assert done.returncode != 0
    if point == "base.published":  # the pager was killed
        assert b"RestoreError" in done.stderr
    assert np.array_equal(pageferry.load(image, memory="shared")["x"], np.arange(COUNT))


@root
def test_readers_see_no_wrong_element_while_pagers_are_killed(tmp_path: Path, run_directory: Registry) -> None:
    path, count = tmp_path / "large.img", 64 * MIB // 8
    pageferry.dump({"x": np.arange(count)}, path)
    with ExitStack() as stack:
        workers = [stack.enter_context(Program(*READER, str(path), "c")) for _ in range(3)]
        for worker in workers:
            worker.json()
        killed = []
        for number in range(4):
            for place, worker in enumerate(workers):
                worker.say(f"read {(number * 1_900_000 + place * 300_000) % count}")
            os.kill(killed_now := pager_of(run_directory), signal.SIGKILL)
            killed.append(killed_now)
            arena = pageferry.restore(path, memory="shared", prefetch=False)
            for place, worker in enumerate(workers):
                assert worker.json() == (number * 1_900_000 + place * 300_000) % count
        assert len(set(killed)) == 4
        for worker in workers:
            worker.say("sum")
            assert worker.json() == count * (count - 1) // 2
        del arena


@root
def test_pagers_that_have_exited_are_no_zombies_of_a_program_that_runs_on(image: Path, run_directory: Registry) -> None:
    pagers = []
    for _ in range(2):
        loaded = pageferry.load(image, memory="shared", prefetch=False)
        pagers.append(pager_of(run_directory))
        del loaded
        gc.collect()
        wait_until(lambda: not base_records.base_folders(run_directory), "the exit of the pager")
        wait_until(lambda: proc.start_time(pagers[-1]) is None, "the exit of the pager")
    again = pageferry.load(image, memory="shared", prefetch=False)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pagers)
    del again


@root
def test_freed_memory_ends_the_pager_while_the_program_runs(image: Path, run_directory: Registry) -> None:
    loaded = pageferry.load(image, memory="shared")
    view = loaded["x"][5:]
    del loaded
    gc.collect()
    assert view[0] == 5
    assert base_records.base_folders(run_directory)
    del view
    gc.collect()
    wait_until(lambda: not base_records.base_folders(run_directory), "the exit of the pager")


@root
def test_child_of_a_fork_reads_all_contents(image: Path) -> None:
    x = pageferry.load(image, memory="shared", prefetch=False)["x"]
    child = os.fork()
    if not child:
        os._exit(0 if int(x.sum()) == COUNT * (COUNT - 1) // 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert int(x.sum()) == COUNT * (COUNT - 1) // 2


@root
def test_child_reads_all_contents_after_the_image_was_replaced(image: Path) -> None:
    x = pageferry.load(image, memory="shared", prefetch=False)["x"]
    pageferry.dump({"x": np.zeros(COUNT)}, image)
    child = os.fork()
    if not child:
        os._exit(0 if int(x.sum()) == COUNT * (COUNT - 1) // 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@root
def test_memory_that_the_base_contains_needs_no_pager(tmp_path: Path, run_directory: Registry) -> None:
    arena = pageferry.Arena(4 * MIB)
    np.frombuffer(memoryview(arena), "i8")[:] = np.arange(1, 4 * MIB // 8 + 1)
    pageferry.checkpoint(arena, path := tmp_path / "full.img")
    shared = pageferry.restore(path, memory="shared", prefetch=False)
    assert shared.deferred == 4 * MIB
    shared.load()
    os.kill(killed := pager_of(run_directory), signal.SIGKILL)
    wait_until(lambda: proc.start_time(killed) is None, "the end of the pager")
    pageferry.checkpoint(arena, path)  # replaces the image at the path
    assert shared.deferred == 0
    shared.ensure(5, 4 * MIB - 5)
    child = os.fork()
    if not child:
        os._exit(0 if memoryview(shared) == memoryview(arena) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del shared
    gc.collect()
    assert base_records.base_folders(run_directory)  # left by the killed pager
    assert describe_bases() == []
    assert not base_records.base_folders(run_directory)


def base_and_sum(array: Any) -> tuple[int, int]:
    """In a worker, return the number of processes that share the memory, and the sum of an array."""
    [base] = describe_bases()
    return len(base.clones), int(array.sum())


def use_run_directory(path: str) -> None:
    """Choose the run directory of a worker."""
    os.environ["PAGEFERRY_RUN_DIR"] = path


@root
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_of_a_pool_shares_the_memory_of_a_read_only_array(image: Path, method: str) -> None:
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # that of an earlier test has another run directory
    x = pageferry.load(image, memory="shared")["x"]
    # A fork server that an earlier test has started has the environment of that time.
    run = os.environ["PAGEFERRY_RUN_DIR"]
    with ProcessPoolExecutor(1, get_context(method), initializer=use_run_directory, initargs=(run,)) as pool:
        assert pool.submit(base_and_sum, x).result(DEADLINE) == (2, int(x.sum()))


@root
def test_arrays_by_name_share_the_memory_and_have_private_changes(tmp_path: Path) -> None:
    with pageferry.Arrays("8MiB") as table:
        table["x"] = np.arange(1000)
        pageferry.checkpoint(table, tmp_path / "arrays.img")
    one, other = (pageferry.Arrays.restore(tmp_path / "arrays.img", memory="shared") for _ in range(2))
    one["x"][0] = 7
    one["y"] = np.ones(5)
    one.resize("x", 2000)
    assert (list(one), list(other), len(one["x"]), len(other["x"]), other["x"][0]) == (["x", "y"], ["x"], 2000, 1000, 0)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(base_and_sum, one["x"]).result(DEADLINE) == (2, 999 * 500 + 7)
        with pytest.raises(UsageError, match="changes are private"):
            pool.submit(len, one).result(DEADLINE)
    with pytest.raises(UnsupportedError, match="its pages are private"):
        one.trim()


def is_mapped_writable(array: Any) -> bool:
    """Return whether the memory of an array is mapped writable, which strict overcommit counts in each process."""
    address = int(array.__array_interface__["data"][0])
    return any("wr" in one.flags for one in smaps(os.getpid()) if one.mapping.address <= address < one.mapping.end)


@root
def test_read_only_memory_is_not_mapped_writable(image: Path) -> None:
    x = pageferry.load(image, memory="shared")["x"]
    assert not is_mapped_writable(x)
    assert is_mapped_writable(pageferry.load(image, "c", memory="shared")["x"])
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert not pool.submit(is_mapped_writable, x).result(DEADLINE)
    assert int(x.sum()) == COUNT * (COUNT - 1) // 2


@root
def test_changed_array_is_copied_to_a_worker(image: Path) -> None:
    x = pageferry.load(image, "c", memory="shared")["x"]
    x[0] = 5
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(base_and_sum, x).result(DEADLINE) == (1, COUNT * (COUNT - 1) // 2 + 5)


@root
def test_damaged_contents_raise_an_error_and_are_never_zeros(tmp_path: Path) -> None:
    path = tmp_path / "damaged.img"
    contents = np.random.default_rng(1).integers(0, 1 << 62, COUNT * 4)
    pageferry.dump({"x": contents}, path)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))
    arena = pageferry.restore(path, memory="shared", prefetch=False)
    with pytest.raises(ImageError, match="cannot read bytes"):
        arena.load()


LOW_LIMIT = """
import resource, sys, pageferry.errors
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
try:
    pageferry.load(sys.argv[1], memory="shared")
except pageferry.errors.RestoreError as error:
    print(error)
"""


@root
def test_error_names_the_limit_of_locked_memory() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o777)
        pageferry.dump({"x": np.arange(COUNT)}, path := folder / "object.img")
        path.chmod(0o644)
        done = users.run("user", folder, "-c", LOW_LIMIT, str(path))
        assert "RLIMIT_MEMLOCK, which is 65536 bytes (`ulimit -l`), or use separate memory" in done.stdout, done.stderr


def test_error_of_a_host_without_space_names_separate_memory(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        raise UnsupportedError("the pages do not fit on /dev/shm; remount it")

    monkeypatch.setattr(base_client, "connect", refuse)
    with pytest.raises(UnsupportedError, match=r"remount it; otherwise restore it with memory=.own."):
        pageferry.load(image, memory="shared")


@pytest.mark.alone
@root
@pytest.mark.parametrize("kind", ["user", "sandbox"])
def test_user_who_cannot_handle_page_faults_shares_memory_that_is_loaded_in_advance(kind: str) -> None:
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if not switch.exists() or switch.read_text().strip() != "0":
        pytest.skip("every user may create a userfaultfd on this host")
    with tempfile.TemporaryDirectory() as made, ExitStack() as stack:
        folder = Path(made)
        folder.chmod(0o777)
        path = folder / "object.img"
        pageferry.dump({"x": np.arange(COUNT)}, path)
        path.chmod(0o644)
        host = users.host(kind, folder)
        workers = [stack.enter_context(host.program(*READER, str(path), "c")) for _ in range(2)]
        sizes = []
        for worker in workers:
            assert worker.json() == {"eager": 1}
            worker.say("sum")
            assert worker.json() == COUNT * (COUNT - 1) // 2
        for worker in workers:
            worker.say("pss")
            sizes.append(worker.json())
        if kind == "user":  # each sandbox has a separate /dev/shm
            assert sum(sizes) <= 1.1 * 4 * MIB
        workers[0].say("write 3")
        workers[0].json()
        workers[1].say("read 3")
        assert workers[1].json() == 3
