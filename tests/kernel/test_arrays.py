"""Named arrays in one arena: comparison with a dict of arrays, states of the memory between the steps of an operation,
checkpoints and migrations."""

from __future__ import annotations

import gc
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
import zlib
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pageferry
from pageferry._engine import own_mappings
from pageferry.errors import ImageError, UsageError, WorkloadError, WrongType
from pageferry.objects import load, transfer
from pageferry.objects.array_directory import DirectoryView, Version
from pageferry.workloads import handles
from pageferry.workloads.arena.arena import memory_file
from pageferry.workloads.handles import attach_handle
from tests.kernel.programs import DEADLINE

DTYPES = ["u1", "<i4", ">f8", "M8[s]", "S5", "<U3", [("a", "i4"), ("b", "f8", (2,))]]
NAMES = ["a", "b", "c", "long name", "ü"]
SIZE = 256 << 10
LARGE = 64 << 20
"""Size that suffices for all arrays of `OPERATION`, and for the contents that older views keep."""


def arrays_in(memory: bytes) -> pageferry.Arrays:
    """Return the arrays in a copy of an arena's memory."""
    file, _ = memory_file(len(memory), large_pages=False)
    try:
        arena = pageferry.Arena.from_file(file, len(memory), paused=False)
    finally:
        os.close(file)
    memoryview(arena)[:] = memory
    return pageferry.Arrays.over(arena)


def assert_same(found: pageferry.Arrays, expected: dict[str, Any]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


# -- against a model

SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
OPERATION = st.tuples(
    st.sampled_from(["set", "zeros", "empty", "delete", "resize", "write", "hold", "drop"]),
    st.sampled_from(NAMES),
    SHAPES,
    st.sampled_from(DTYPES),
    st.integers(0, 1 << 30),
)


def contents(shape: tuple[int, ...], dtype: Any, seed: int) -> Any:
    """Return an array of random bytes."""
    size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
    letters = np.random.default_rng(seed).integers(65, 70, size, np.uint8)
    if np.dtype(dtype).kind == "U":
        letters = np.resize(np.array([65, 0, 0, 0], np.uint8), size)
    return np.ndarray(shape, dtype, buffer=letters.tobytes()).copy()


def apply(table: pageferry.Arrays, model: dict[str, Any], operation: tuple[Any, ...], held: list[Any]) -> None:
    """Apply an operation to the arrays and to the model."""
    kind, name, shape, dtype, seed = operation
    match kind:
        case "set":
            table[name] = model[name] = contents(shape, dtype, seed)
        case "zeros":
            model[name] = np.zeros(shape, dtype)
            assert table.zeros(name, shape, dtype).tobytes() == model[name].tobytes()
        case "empty":
            model[name] = contents(shape, dtype, seed)
            table.empty(name, shape, dtype)[...] = model[name]
        case "delete" if name in model:
            del table[name], model[name]
        case "resize" if name in model and model[name].ndim:
            count = seed % 100
            old = model[name]
            model[name] = np.zeros((count, *old.shape[1:]), old.dtype)
            model[name][: len(old)] = old[:count]
            assert len(table.resize(name, count)) == count
        case "write" if name in model:
            model[name] = contents(model[name].shape, model[name].dtype, seed)
            table[name][...] = model[name]
        case "hold" if name in model:
            held.append((view := table[name].view(), view.copy(), name))
        case "drop" if held:
            held.pop(seed % len(held))


@given(st.lists(OPERATION, max_size=15))
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_arrays_match_a_dict_of_arrays(operations: list[tuple[Any, ...]]) -> None:
    table, model, held = pageferry.Arrays(SIZE), dict[str, Any](), list[Any]()
    for operation in operations:
        before = dict(model)
        try:
            apply(table, model, operation, held)
        except UsageError:  # no free extent is large enough
            model = before
        assert_same(table, model)
    assert_same(arrays_in(bytes(table.arena)), model)


@given(st.lists(OPERATION, max_size=15))
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_older_views_keep_their_contents(operations: list[tuple[Any, ...]]) -> None:
    table, model, held = pageferry.Arrays(LARGE), dict[str, Any](), list[Any]()
    for operation in operations:
        written = operation[1] if operation[0] in ("write", "resize") else None
        held = [one for one in held if one[2] != written]
        apply(table, model, operation, held)
        assert all(view.tobytes() == expected.tobytes() for view, expected, _ in held)
    held.clear()
    for name in list(table):
        del table[name]
    assert table.free >= LARGE - 4096 - 128


def test_memory_at_every_instant_contains_a_valid_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the memory around each store to the directory. All copies but the last have the arrays before the change."""
    table, model, copies = pageferry.Arrays(SIZE), dict[str, Any](), list[bytes]()
    write, publish = DirectoryView.write, DirectoryView.publish

    def copying_write(self: DirectoryView, root: int, encoded: bytes) -> Version:
        copies.append(bytes(table.arena))
        write(self, root, encoded[: len(encoded) // 2])
        copies.append(bytes(table.arena))
        version = write(self, root, encoded)
        copies.append(bytes(table.arena))
        return version

    def copying_publish(self: DirectoryView, root: int) -> None:
        publish(self, root)
        copies.append(bytes(table.arena))

    generator = random.Random(5)
    for number in range(60):
        kind = generator.choice(["set", "set", "delete", "resize", "empty"])
        shape = tuple(generator.randrange(30) for _ in range(generator.randrange(1, 3)))
        operation = (kind, generator.choice(NAMES), shape, generator.choice(DTYPES), number * 7)
        before = {name: array.copy() for name, array in model.items()}
        with monkeypatch.context() as patch:
            patch.setattr(DirectoryView, "write", copying_write)
            patch.setattr(DirectoryView, "publish", copying_publish)
            apply(table, model, operation, [])
        for copy in copies:
            found = arrays_in(copy)
            after = copy is copies[-1]
            if kind == "empty" and after and operation[1] in found:
                found[operation[1]][...] = model[operation[1]]  # undefined
            assert_same(found, model if after else before)
        copies.clear()


def test_checkpoints_by_another_process_contain_complete_operations(tmp_path: Path) -> None:
    table = pageferry.Arrays("64MiB", "instants", on_pause=lambda: None, direct_io=False)
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            table["pair"] = np.full(1000 + number % 7 * 500, number)
            table[f"n{number % 50}"] = np.full(10, number)
            if number % 3 == 0:
                table.resize(f"n{number % 50}", number % 40)

    writer = threading.Thread(target=change)
    writer.start()
    try:
        for number in range(2):
            time.sleep(0.05)
            command = [sys.executable, "-m", "pageferry", "checkpoint", "instants", str(tmp_path / f"{number}.img")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
            assert done.returncode == 0, done.stderr
    finally:
        stop.set()
        writer.join()
        table.close()
    for number in range(2):
        found = pageferry.Arrays.restore(tmp_path / f"{number}.img")
        assert len(set(found["pair"].tolist())) == 1
        assert len(found["pair"]) == 1000 + found["pair"][0] % 7 * 500
        assert all(len({*array.tolist(), 0}) <= 2 for name, array in found.items() if name != "pair")


def test_operations_of_several_threads_are_all_done() -> None:
    table = pageferry.Arrays("64MiB")

    def work(name: str) -> None:
        for number in range(50):
            table[name] = np.full(number * 10 + 1, number)
            table.resize(name, number * 20 + 2)
            table[f"{name}-{number}"] = np.full(3, number)
            if number % 2:
                del table[f"{name}-{number}"]

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(table) == 4 * 26
    assert all(int(array.sum()) == 49 * 491 for name, array in table.items() if "-" not in name)
    assert_same(arrays_in(bytes(table.arena)), {name: array.copy() for name, array in table.items()})


# -- behaviour of the mapping


def test_array_in_its_own_place_is_not_copied() -> None:
    table = pageferry.Arrays(SIZE)
    table["x"] = np.arange(10)
    view = table["x"]
    table["x"] += 1
    assert list(view) == list(range(1, 11))
    table["x"] = table["x"][::-1]
    assert list(table["x"]) == list(range(10, 0, -1))
    assert list(view) == list(range(1, 11))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda t: t.empty("", 3), "name"),
        (lambda t: t.empty(3, 3), "name"),
        (lambda t: t.empty("n" * 2000, 3), "name"),
        (lambda t: t.empty("n", -1), "shape"),
        (lambda t: t.empty("n", (3, "4")), "shape"),
        (lambda t: t.empty("n", (1 << 40, 1 << 40)), "shape"),
        (lambda t: t.empty("n", 3, object), "Python objects"),
        (lambda t: t.empty("n", 3, "nothing"), "dtype"),
        (lambda t: t.empty("n", SIZE), "delete arrays"),
        (lambda t: t.resize("x", -1), "count"),
        (lambda t: t.resize("point", 1), "no axis"),
        (lambda t: t.update(n=[None, {}]), "Python objects"),
    ],
)
def test_invalid_operations_change_nothing(call: Any, match: str) -> None:
    table = pageferry.Arrays(SIZE)
    table["x"] = np.arange(3)
    table["point"] = np.array(1.0)
    free = table.free
    with pytest.raises(UsageError, match=match):
        call(table)
    assert_same(table, {"x": np.arange(3), "point": np.array(1.0)})
    assert table.free == free


def test_unknown_names_raise_key_error() -> None:
    table = pageferry.Arrays(SIZE)
    with pytest.raises(KeyError, match="x"):
        table["x"]
    with pytest.raises(KeyError, match="x"):
        table.resize("x", 1)
    with pytest.raises(KeyError):
        del table["x"]
    assert "x" not in table


@pytest.mark.parametrize("size", [0, 4096, "nothing", None, 1 << 50])
def test_invalid_sizes_are_refused(size: Any) -> None:
    with pytest.raises(UsageError):
        pageferry.Arrays(size)


def test_memory_of_deleted_arrays_is_returned_to_the_system() -> None:
    table = pageferry.Arrays("64MiB")
    table["x"] = np.ones(4 << 20, np.uint8)
    table["kept"] = np.ones(1 << 20, np.uint8)
    view = table["x"][:10]
    del table["x"]
    before = sum(end - start for start, end in table.arena.data_ranges())
    table.trim()
    assert sum(view) == 10
    del view
    gc.collect()
    assert table.trim() >= 4 << 20
    assert before - sum(end - start for start, end in table.arena.data_ranges()) >= 4 << 20
    assert table["kept"].sum() == 1 << 20


def test_memory_is_freed_with_the_last_view() -> None:
    before = set(own_mappings())
    table = pageferry.Arrays(SIZE)
    row = table.zeros("x", (10, 10))[3]
    reference = weakref.ref(table.arena)
    del table
    gc.collect()
    assert reference() is not None
    row[:] = 5
    del row
    gc.collect()
    assert reference() is None
    assert set(own_mappings()) <= before


def test_arrays_of_an_arena_are_one_object() -> None:
    table = pageferry.Arrays(SIZE)
    assert pageferry.Arrays.over(table.arena) is table


def test_arrays_are_exchanged_without_copies() -> None:
    table = pageferry.Arrays(SIZE)
    x = table.zeros("x", 10)
    np.from_dlpack(x)[1] = 1
    np.asarray(memoryview(x))[2] = 2  # type: ignore[arg-type]  # numpy has no __buffer__
    assert list(table["x"][:4]) == [0, 1, 2, 0]
    pyarrow = pytest.importorskip("pyarrow")
    assert pyarrow.py_buffer(x).address == x.__array_interface__["data"][0]


# -- checkpoints, migrations, processes


def test_restored_arrays_are_changed_and_saved_again(tmp_path: Path) -> None:
    table = pageferry.Arrays("1GiB")
    table["big"] = np.random.default_rng(1).random((1000, 100))
    for number in range(20):
        table[f"n{number}"] = np.arange(number)
    del table["n3"]
    pageferry.checkpoint(table, tmp_path / "first.img")
    found = pageferry.Arrays.restore(tmp_path / "first.img", prefetch=False)
    assert_same(found, dict(table))
    found["n4"] = np.arange(50.0)
    found.resize("big", 1500)[1000:] = 7
    del found["n5"]
    result = pageferry.checkpoint(found, tmp_path / "second.img", parent=tmp_path / "first.img")
    assert result.pages.data < 400
    again = pageferry.Arrays.restore(tmp_path / "second.img")
    assert_same(again, {name: array.copy() for name, array in found.items()})


def test_migrated_arrays_are_used_at_the_destination(tmp_path: Path) -> None:
    code = (
        "import sys, numpy, pageferry\n"
        "ready = lambda _: print('ready', flush=True)\n"
        "table = pageferry.Arrays.over(pageferry.receive(sys.argv[1], listening=ready))\n"
        "table['y'] = table['x'] * 2\n"
        "del table['x']\n"
        "print(list(table), table['y'].sum())\n"
    )
    address = f"unix:{tmp_path}/socket"
    receiver = subprocess.Popen([sys.executable, "-c", code, address], stdout=subprocess.PIPE, text=True)
    try:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        table = pageferry.Arrays("64MiB")
        table["x"] = np.arange(1000)
        pageferry.migrate(table, address)
        with pytest.raises(WorkloadError, match="migrated"):
            table["z"] = np.zeros(3)
        with pytest.raises(ValueError, match="read-only"):
            table["x"][0] = 1
        output, _ = receiver.communicate(timeout=DEADLINE)
        assert output.split() == ["['y']", "999000"]
    finally:
        receiver.kill()
        receiver.wait()


def test_forked_child_uses_arrays_and_cannot_add_any() -> None:
    table = pageferry.Arrays(SIZE)
    table["x"] = np.arange(10)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            table["x"][0] = 100
            try:
                table["y"] = np.zeros(3)
            except WorkloadError:
                code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert table["x"][0] == 100


def test_forked_child_sees_arrays_that_are_added_later() -> None:
    table = pageferry.Arrays("1MiB")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.read(read, 1)
            code = 0 if int(table["x"].sum()) == 45 and len(table) == 1 else 2
        finally:
            os._exit(code)
    for number in range(100):
        table["x"] = np.arange(number)
    table["x"] = np.arange(10)
    os.write(write, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(read)
    os.close(write)


def in_child(function: Callable[[], object]) -> int:
    """Return the id of a forked child, which exits with 0 if the function returns a true value within a minute."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            code = 0 if function() else 2
        finally:
            os._exit(code)
    return pid


def test_child_sees_a_later_directory_at_the_same_offset() -> None:
    table = pageferry.Arrays("1MiB")
    read, write = os.pipe()
    table["x"] = np.arange(10)
    view = DirectoryView(memoryview(table.arena))
    root = view.root
    pid = in_child(lambda: os.read(read, 1) and table["x"].tolist() == list(range(8)))
    table.resize("x", 9)
    assert view.root != root
    table.resize("x", 8)
    assert view.root == root
    os.write(write, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(read)
    os.close(write)


def test_directory_is_read_again_while_its_memory_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pageferry.Arrays(SIZE)
    table["x"] = np.arange(10)
    view = DirectoryView(memoryview(table.arena))
    root, complete = view.root, bytes(table.arena)
    start = root + 16
    memoryview(table.arena)[start : start + 20] = bytes(20)  # the owner is writing a later directory
    attempts = list[Version]()
    read = DirectoryView.read

    def writing_read(self: DirectoryView, version: Version) -> Any:
        attempts.append(version)
        if len(attempts) == 3:
            memoryview(table.arena)[:] = complete
        return read(self, version)

    monkeypatch.setattr(DirectoryView, "read", writing_read)
    version, entries, _ = view.latest()
    assert (version.root, list(entries), len(attempts)) == (root, ["x"], 3)


def test_child_reads_while_the_owner_changes_the_directory() -> None:
    table = pageferry.Arrays("1MiB")
    table["fixed"] = np.arange(10)

    def reads() -> bool:
        return all(table["fixed"].sum() == 45 and len(table) in (1, 2) for _ in range(3000))

    pid = in_child(reads)
    status = (0, 0)
    while status == (0, 0):
        for number in range(20):
            table["other"] = np.zeros(number)
            del table["other"]
        status = os.waitpid(pid, os.WNOHANG)
    assert status[1] == 0


def test_child_of_a_fork_does_not_wait_for_locks_of_threads() -> None:
    table = pageferry.Arrays("1MiB")
    table["x"] = np.arange(10)
    held = [module._lock for module in (handles, transfer, load)]
    with held[0], held[1], held[2]:
        handle: Any = table.arena.handle()
        attaching = in_child(lambda: attach_handle(handle))
        pickling = in_child(lambda: ForkingPickler.dumps(table["x"]))
        loading = in_child(lambda: load._lock.acquire(timeout=30))
        assert [os.waitpid(pid, 0)[1] for pid in (attaching, pickling, loading)] == [0, 0, 0]


# -- damaged and hostile memory


def sample() -> bytearray:
    table = pageferry.Arrays(SIZE)
    table["x"] = np.arange(10)
    table["y"] = np.zeros((3, 4), "f4")
    return bytearray(table.arena)


def hostile(entries: dict[str, Any]) -> bytearray:
    """Return memory with a directory of these entries, and a correct checksum."""
    memory, encoded = sample(), msgspec.msgpack.encode(entries)
    memory[128 << 10 : (128 << 10) + 16 + len(encoded)] = (
        struct.pack("<QQ", len(encoded), zlib.crc32(encoded)) + encoded
    )
    memory[16:24] = struct.pack("<Q", 128 << 10)
    return memory


X = {"offset": 4096, "capacity": 4096, "dtype": "<f8", "shape": [10]}


@pytest.mark.parametrize(
    "entry",
    [
        {"offset": 0},
        {"offset": 4097},
        {"offset": SIZE},
        {"offset": 1 << 45},
        {"capacity": 0},
        {"capacity": 1 << 45},
        {"capacity": 64, "shape": [9]},
        {"offset": 128 << 10},
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [-1]},
        {"shape": [0, 1 << 46, 1 << 46]},
        {"dtype": "V0", "shape": [1 << 46, 1 << 46]},
        {"dtype": "O"},
        {"dtype": "[('a', 'O')]"},
        {"dtype": "__import__('os')"},
        {"dtype": "[" * 1000},
        {"dtype": "x" * 70000},
        {"more": 1},
    ],
)
def test_hostile_directory_is_refused(entry: dict[str, Any]) -> None:
    arrays_in(bytes(hostile({"x": X})))
    with pytest.raises(ImageError, match="cannot open the arrays"):
        arrays_in(bytes(hostile({"x": X | entry})))
    with pytest.raises(ImageError, match="overlaps"):
        arrays_in(bytes(hostile({"x": X, "y": X})))


def test_damaged_directory_is_refused() -> None:
    for position, value in ((16, 1 << 20), (16, 64), (16, 4097), (16, SIZE - 8)):
        memory = sample()
        memory[position : position + 8] = struct.pack("<Q", value)
        with pytest.raises(ImageError, match="cannot open the arrays"):
            arrays_in(bytes(memory))
    memory = sample()
    root = struct.unpack_from("<Q", memory, 16)[0]
    for position in range(root, root + 40):
        damaged = bytearray(memory)
        damaged[position] ^= 255
        with pytest.raises(ImageError):
            arrays_in(bytes(damaged))


def test_arenas_without_arrays_are_refused(tmp_path: Path) -> None:
    arena = pageferry.Arena(SIZE)
    with pytest.raises(UsageError, match="no directory of arrays"):
        pageferry.Arrays.over(arena)
    with pytest.raises(WrongType):
        pageferry.Arrays.over(b"")  # type: ignore[arg-type]  # an error of the caller
    pageferry.checkpoint(arena, tmp_path / "image")
    with pytest.raises(UsageError, match="no directory of arrays"):
        pageferry.Arrays.restore(tmp_path / "image", "name", on_pause=lambda: None)
    pageferry.restore(tmp_path / "image", "name", on_pause=lambda: None).close()
