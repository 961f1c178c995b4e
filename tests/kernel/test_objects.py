"""Dump and load of Python objects through real images and page faults (S4, S10)."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import pageferry
from pageferry._engine import own_mappings
from pageferry.errors import CheckpointError, ImageError, RestoreError, UsageError, WrongType
from pageferry.images import metadata
from pageferry.images.image import ImageFile, new_file
from pageferry.objects import dump as dumping
from pageferry.objects import layout
from tests import torch_stand_in
from tests.kernel.images import Maker
from tests.kernel.programs import DEADLINE


class Model:
    """Object with buffers in its attributes."""

    def __init__(self) -> None:
        self.weights = np.random.default_rng(1).random((1000, 50))
        self.names = ["a", "b"]


def sample() -> dict[str, Any]:
    generator = np.random.default_rng(2)
    return {
        "x": generator.random(300_000),
        "f": np.asfortranarray(generator.random((300, 70))),
        "t": np.arange(5000).astype("M8[s]"),
        "half": np.concatenate([np.zeros(100_000), generator.random(1000)]),
        "small": [np.arange(count) for count in range(5)],
        "text": "plain",
        "model": Model(),
    }


def assert_same(found: Any, expected: Any) -> None:
    for name in ("x", "f", "t", "half"):
        assert np.array_equal(found[name], expected[name]), name
    assert all(np.array_equal(*pair) for pair in zip(found["small"], expected["small"], strict=True))
    assert found["text"] == expected["text"]
    assert np.array_equal(found["model"].weights, expected["model"].weights)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pageferry.dump(sample(), tmp_path / "object.img")
    return tmp_path / "object.img"


@pytest.mark.parametrize("codec", ["lz4", "none", "zstd"])
@pytest.mark.parametrize("mode", ["r", "c", "w"])
def test_object_is_loaded_as_dumped(mode: Any, codec: Any, tmp_path: Path) -> None:
    result = pageferry.dump(sample(), tmp_path / "image", codec=codec)
    assert result.stored == (tmp_path / "image").stat().st_size
    assert result.buffers == 10
    found = pageferry.load(tmp_path / "image", mode)
    assert_same(found, sample())
    assert found["x"].flags.writeable is (mode != "r")
    assert ImageFile(tmp_path / "image").verify() == []


def test_object_of_many_pieces_is_loaded_as_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumping, "PIECE", 8192)
    generator = np.random.default_rng(3)
    obj = [generator.integers(0, 255, size, np.uint8) for size in (1, 100_000, 4095, 4096, 4097, 8192, 64, 3, 50_000)]
    pageferry.dump(obj, tmp_path / "image")
    assert all(np.array_equal(*pair) for pair in zip(pageferry.load(tmp_path / "image"), obj, strict=True))


def test_only_accessed_buffers_are_loaded(image: Path) -> None:
    found = pageferry.load(image, "w", prefetch=False)
    arena = pageferry.arena_of(found)
    before = arena.deferred
    assert found["x"][150_000] == sample()["x"][150_000]
    assert 0 < before - arena.deferred <= 1 << 20
    assert before > 3_000_000


def test_coroutine_forms_do_not_block_the_loop(tmp_path: Path) -> None:
    async def main() -> Any:
        await pageferry.dump_async(sample(), tmp_path / "image")
        return await pageferry.load_async(tmp_path / "image", mode="c")

    assert_same(asyncio.run(main()), sample())


# -- modes


def test_mode_r_refuses_writes(image: Path) -> None:
    found = pageferry.load(image)
    with pytest.raises(ValueError, match="read-only"):
        found["x"][0] = 1


def test_mode_c_leaves_the_image_unchanged(image: Path) -> None:
    before = image.read_bytes()
    found = pageferry.load(image, "c")
    found["x"][:] = 7
    found["model"].weights[3, 3] = 7
    del found
    assert image.read_bytes() == before
    assert_same(pageferry.load(image), sample())
    with pytest.raises(UsageError, match="cannot find the arena"):
        pageferry.arena_of(pageferry.load(image, "c"))


def test_arena_of_an_object_with_a_replaced_array_is_refused(image: Path) -> None:
    found = pageferry.load(image, "w")
    pageferry.arena_of(found)
    found["f"] = found["f"] + 1
    with pytest.raises(UsageError, match="not all of its writable buffers"):
        pageferry.arena_of(found)
    with pytest.raises(UsageError, match="no writable buffer"):
        pageferry.arena_of("text")


def test_writers_of_mode_w_are_paused(image: Path) -> None:
    calls: list[str] = []
    found = pageferry.load(image, "w", on_pause=lambda: calls.append("pause"), on_resume=lambda: calls.append("run"))
    calls.clear()
    pageferry.checkpoint(pageferry.arena_of(found), image.parent / "paused.img")
    assert calls[-2:] == ["pause", "run"]
    with pytest.raises(UsageError, match="only mode w"):
        pageferry.load(image, "c", on_pause=lambda: None)


def test_checkpoint_of_mode_w_contains_the_changed_buffers(image: Path) -> None:
    found = pageferry.load(image, "w")
    found["x"][1000] = 42.0
    found["model"].weights[3, 3] = 43.0
    found["text"] = "not saved"
    arena = pageferry.arena_of(found["x"][5:10])
    assert arena is pageferry.arena_of(found)
    child = image.parent / "child.img"
    result = pageferry.checkpoint(arena, child, parent=image)
    assert result.pages.data <= 2
    again = pageferry.load(child, "w")
    assert again["x"][1000] == 42.0
    assert again["model"].weights[3, 3] == 43.0
    assert again["text"] == "plain"
    assert np.array_equal(again["f"], sample()["f"])
    again["x"][1001] = 44.0
    pageferry.checkpoint(pageferry.arena_of(again), image.parent / "alone.img")
    assert list(pageferry.load(image.parent / "alone.img")["x"][1000:1002]) == [42.0, 44.0]


class Copies:
    """Object that copies its buffer when it is created from a pickle."""

    def __init__(self, contents: Any) -> None:
        self.contents = bytes(contents)

    def __reduce_ex__(self, protocol: object) -> Any:
        return Copies, (pickle.PickleBuffer(bytearray(self.contents)),)


@pytest.mark.parametrize("obj", [Copies(b"x" * 5000), {"only": "text"}, [np.zeros(0)], b"bytes"])
def test_mode_w_refuses_objects_whose_changes_would_be_lost(obj: object, tmp_path: Path) -> None:
    pageferry.dump(obj, tmp_path / "image")
    with pytest.raises(UsageError, match="changes would not be saved"):
        pageferry.load(tmp_path / "image", "w")
    pageferry.load(tmp_path / "image", "c")


def test_tensors_are_loaded_in_mode_c_and_refused_in_mode_r(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = torch_stand_in.module()
    monkeypatch.setitem(sys.modules, "torch", torch)
    storage = torch.UntypedStorage(contents=np.arange(10_000, dtype=np.uint8))
    pageferry.dump({"a": torch.Tensor(storage, "uint8", 5, 10)}, tmp_path / "image")
    assert pageferry.load(tmp_path / "image", "c")["a"].numpy()[0] == 5
    with pytest.raises(UsageError, match="cannot create a read-only tensor"):
        pageferry.load(tmp_path / "image")
    tensor = pageferry.load(tmp_path / "image", "w")["a"]
    assert pageferry.arena_of(tensor).length >= 10_000


# -- lifetimes


def test_memory_lives_as_long_as_the_last_buffer_and_no_longer(image: Path) -> None:
    gc.collect()
    before = set(own_mappings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pageferry.load(image, "w")
        arena = weakref.ref(pageferry.arena_of(found))
        row = found["x"][10:20]
        del found
        gc.collect()
        assert arena() is not None
        assert np.array_equal(row, sample()["x"][10:20])
        del row
        gc.collect()
    assert arena() is None
    assert not set(own_mappings()) - before


def test_repeated_loads_leave_no_descriptors(tmp_path: Path) -> None:
    pageferry.dump(np.arange(1000), tmp_path / "image")
    pageferry.load(tmp_path / "image")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        assert pageferry.load(tmp_path / "image")[999] == 999
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 8


def test_object_is_loaded_in_a_forked_child_too(image: Path) -> None:
    code = (
        "import os, sys, pageferry\n"
        "found = pageferry.load(sys.argv[1], prefetch=False)\n"
        "pid = os.fork()\n"
        "total = float(found['x'].sum())\n"
        "if not pid:\n    os._exit(0 if total > 1 else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, image], timeout=DEADLINE, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


# -- failures


def test_failed_dump_leaves_the_old_image(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = image.read_bytes()
    with pytest.raises(UsageError, match="cannot dump an object of type dict"):
        pageferry.dump({"f": lambda: None}, image)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dumping, "_write", full)
    with pytest.raises(CheckpointError, match="free some space"):
        pageferry.dump(sample(), image)
    assert image.read_bytes() == before
    assert os.listdir(image.parent) == [image.name]


def test_target_is_replaced_atomically(image: Path) -> None:
    found = pageferry.load(image, prefetch=False)
    pageferry.dump({"x": np.zeros(3)}, image)
    assert_same(found, sample())
    assert list(pageferry.load(image)["x"]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"mode": "rw"}, UsageError),
        ({"mode": 1}, WrongType),
        ({"allow": "numpy.dtype"}, WrongType),
        ({"eager": "yes"}, WrongType),
    ],
)
def test_invalid_arguments_are_refused(image: Path, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        pageferry.load(image, **arguments)


def test_invalid_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="directory"):
        pageferry.dump(1, tmp_path)
    with pytest.raises(CheckpointError, match="create its directory"):
        pageferry.dump(1, tmp_path / "none" / "image")
    with pytest.raises(UsageError, match="codec"):
        pageferry.dump(1, tmp_path / "image", codec="gzip")  # type: ignore[arg-type]  # an error of the caller


def test_truncated_and_damaged_images_are_refused(image: Path) -> None:
    contents = image.read_bytes()
    for length in (0, 100, 4096, len(contents) // 2, len(contents) - 1):
        image.write_bytes(contents[:length])
        with pytest.raises(ImageError):
            pageferry.load(image)
    # The first storage block contains the pickle.
    image.write_bytes(contents[:4200] + bytes(byte ^ 255 for byte in contents[4200:8000]) + contents[8000:])
    with pytest.raises(ImageError):
        pageferry.load(image, prefetch=False)


def test_images_of_other_workloads_are_refused(tmp_path: Path) -> None:
    path = Maker(10).write(tmp_path / "arena.img")
    for call in (pageferry.load, pageferry.open_buffers):
        with pytest.raises(ImageError, match="as an object"):
            call(path)
    with pytest.raises(ImageError, match="cannot open"):
        pageferry.load(tmp_path / "missing")


def rewrite(image: Path, directory: layout.Directory) -> None:
    """Replace the directory of an image."""
    found = ImageFile(image)
    contents = found.read(0, found.pages)
    length = found.metadata.regions[0].length
    with new_file(image) as file:
        dumping._write(file, [(0, memoryview(contents))], length, directory, "lz4")


def test_hostile_directory_is_refused_before_memory_is_mapped(image: Path) -> None:
    directory = layout.decode(ImageFile(image).state(), 1 << 40, image)
    before = own_mappings()
    rewrite(image, layout.Directory(pickle=1 << 40, buffers=directory.buffers))
    with pytest.raises(ImageError, match="is damaged"):
        pageferry.load(image)
    assert own_mappings() == before


@pytest.mark.parametrize(
    "dtype", ["O", "|O8", "[('a', 'O')]", "x" * 1000, "[" * 5000, "__import__('os')", "<f8,<f8", "i"]
)
def test_buffer_with_hostile_type_is_refused_as_an_array(image: Path, dtype: str) -> None:
    state = layout.decode(ImageFile(image).state(), 1 << 40, image)
    info = layout.BufferInfo(offset=4096, length=1000, name="x", dtype=dtype, shape=[125])
    rewrite(image, layout.Directory(pickle=state.pickle, buffers=[info]))
    buffer = pageferry.open_buffers(image)["x"]
    assert buffer.memory().nbytes == 1000
    if dtype == "i":
        assert buffer.array().nbytes == 500
        return
    with pytest.raises(ImageError, match="as an array"):
        buffer.array()


# -- untrusted images


class Evil:
    """Object whose pickle executes a program."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_of_an_untrusted_image_is_not_executed(tmp_path: Path) -> None:
    pageferry.dump({"array": np.arange(10), "evil": Evil(tmp_path / "executed")}, tmp_path / "image")
    for allow in (set(), {"numpy.dtype"}, lambda name: name.startswith("numpy.")):
        with pytest.raises(RestoreError, match=r"posix\.mkdir, which `allow` does not permit|numpy\.dtype"):
            pageferry.load(tmp_path / "image", allow=allow)
    buffers = pageferry.open_buffers(tmp_path / "image")
    assert list(buffers["array"].array()) == list(range(10))
    assert not (tmp_path / "executed").exists()
    pageferry.load(tmp_path / "image")
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("mode", ["r", "c", "w"])
def test_arrays_are_loaded_without_permitted_names(mode: Any, tmp_path: Path) -> None:
    record = np.zeros(3, [("a", "i4"), ("b", "f8", (2,)), ("t", "M8[s]")])
    pageferry.dump({"array": np.arange(10), "record": record, "text": "plain"}, tmp_path / "image")
    found = pageferry.load(tmp_path / "image", mode, allow=set())
    assert found["array"][9] == 9
    assert np.array_equal(found["record"], record)


def test_hostile_pickle_cannot_create_arrays_of_python_objects(tmp_path: Path) -> None:
    arguments = pickle.dumps((bytes(8), "O", (1,), "C"), 3)[2:-1]
    stream = b"\x80\x05cpageferry.objects.rebuild\narray\n" + arguments + b"R."
    with new_file(tmp_path / "image") as file:
        dumping._write(file, [(0, memoryview(stream))], 4096, layout.Directory(pickle=len(stream), buffers=[]), "lz4")
    with pytest.raises(RestoreError, match="Python objects"):
        pageferry.load(tmp_path / "image", allow=set())
    with pytest.raises(RestoreError, match="Python objects"):
        pageferry.load(tmp_path / "image")


def test_permitted_names_are_loaded(tmp_path: Path) -> None:
    pageferry.dump({"array": np.arange(10).astype(np.dtype("i8", metadata={"unit": "m"}))}, tmp_path / "image")
    with pytest.raises(RestoreError, match="`allow` does not permit"):
        pageferry.load(tmp_path / "image", allow=set())
    assert pageferry.load(tmp_path / "image", allow={"numpy.dtype"})["array"][9] == 9
    assert pageferry.load(tmp_path / "image", allow=lambda name: name == "numpy.dtype")["array"][9] == 9


def test_buffers_are_read_without_unpickling(image: Path) -> None:
    buffers = pageferry.open_buffers(image, prefetch=False)
    expected = sample()
    assert list(buffers)[:5] == ["x", "f", "t", "half", "small.0"]
    for name in ("x", "f", "t", "half"):
        buffer = buffers[name]
        assert (buffer.dtype, buffer.shape) == (expected[name].dtype.str, expected[name].shape)
        assert np.array_equal(buffer.array(), expected[name])
        assert not buffer.array().flags.writeable
    assert np.array_equal(buffers["model"].array(), expected["model"].weights)
    assert bytes(buffers["x"].memory()) == expected["x"].tobytes()
    assert bytes(buffers.pickle()[:1]) == b"\x80"


class Two:
    """Object with two buffers."""

    def __init__(self) -> None:
        self.first, self.second = np.full(3, 1), np.full(3, 2)


def test_buffers_whose_names_are_numbers_are_all_found(tmp_path: Path) -> None:
    pageferry.dump({"#2": np.zeros(3, int), "m": Two(), "#4": np.full(3, 3), "n": Two()}, tmp_path / "image")
    buffers = pageferry.open_buffers(tmp_path / "image")
    found = {name: int(buffer.array()[0]) for name, buffer in buffers.items()}
    assert found == {"#2": 0, "m": 1, "##2": 2, "#4": 3, "n": 1, "#5": 2}


def test_object_image_is_restored_as_an_arena_too(image: Path) -> None:
    arena = pageferry.restore(image)
    assert arena.received_state == ImageFile(image).section(metadata.STATE)


# -- libraries


def test_data_frame_of_pandas_is_loaded_on_demand(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "number": np.arange(100_000),
            "real": np.random.default_rng(1).random(100_000),
            "time": pandas.date_range("2020-01-01", periods=100_000, freq="s"),
            "kind": pandas.Categorical(["a", "b"] * 50_000),
            "text": [f"row {number % 10}" for number in range(100_000)],
        }
    )
    result = pageferry.dump(frame, tmp_path / "image")
    assert result.buffer_bytes > 2_400_000
    modes: tuple[Literal["r", "c"], ...] = ("r", "c")
    for mode in modes:
        assert pageferry.load(tmp_path / "image", mode).equals(frame)
    numbers = frame[["number", "real"]]
    pageferry.dump(numbers, tmp_path / "image")
    found = pageferry.load(tmp_path / "image", "w")
    found["real"].to_numpy()
    assert pageferry.arena_of(found).length > 1_600_000


def test_table_of_pyarrow_is_loaded_without_copies(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"n": np.arange(100_000), "s": [f"text {number}" for number in range(100_000)]})
    result = pageferry.dump(table, tmp_path / "image")
    assert result.pickle_bytes < 10_000
    assert pageferry.load(tmp_path / "image").equals(table)


def test_frame_of_polars_is_loaded_without_copies(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    frame = polars.DataFrame({"n": np.arange(100_000), "s": [f"text {number}" for number in range(100_000)]})
    result = pageferry.dump(frame, tmp_path / "image")
    assert result.pickle_bytes < 10_000
    assert pageferry.load(tmp_path / "image").equals(frame)


def test_sparse_matrix_of_scipy_is_loaded_without_copies(tmp_path: Path) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    matrix = sparse.random(1000, 1000, 0.01, format="csr", random_state=1)
    assert pageferry.dump(matrix, tmp_path / "image").pickle_bytes < 2000
    assert (pageferry.load(tmp_path / "image") != matrix).nnz == 0
