"""Tests of the pickling of objects with buffers out of band, and of the directory of these buffers."""

from __future__ import annotations

import io
import math
import pickle
import random
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import ImageError, UsageError
from pageferry.objects import layout
from pageferry.objects.layout import BufferInfo, Directory
from pageferry.objects.pickling import Collected, ObjectPickler, names_of
from tests import torch_stand_in

RECORD = np.dtype([("a", "i4"), ("b", "f8", (2,)), ("t", "M8[s]")])
ARRAYS = [
    np.arange(10),
    np.arange(10).astype("M8[ns]"),
    np.arange(10).astype("m8[us]"),
    np.zeros(3, RECORD),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(16.0).reshape(4, 4)[:, ::2],
    np.arange(16.0).reshape(4, 4)[::-1].T,
    np.array(["a", "bb"]),
    np.zeros(4, "f2"),
    np.arange(4, dtype=">i4"),
    np.ones(3, complex),
    np.zeros(0),
    np.zeros((0, 3)),
    np.array(3.0),
    np.zeros(3, "V0"),
    np.ma.masked_array([1, 2, 3], [False, True, False]),
]


def pickled(obj: object) -> tuple[bytes, Collected]:
    stream, collected = io.BytesIO(), Collected()
    ObjectPickler(stream, collected, names_of(obj)).dump(obj)
    return stream.getvalue(), collected


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}-{array.shape}")
def test_arrays_are_pickled_with_all_contents_out_of_band(array: Any) -> None:
    stream, collected = pickled(array)
    again = pickle.loads(stream, buffers=[view.toreadonly() for view in collected.views])
    assert (type(again), again.dtype, again.shape) == (type(array), array.dtype, array.shape)
    assert np.array_equal(again, array)
    assert collected.infos[0].length == array.nbytes
    assert len(stream) < 700
    if array.size and array.dtype.itemsize:
        assert not again.flags.writeable


def test_array_of_objects_is_part_of_the_pickle() -> None:
    array = np.array(["x", None, 3], object)
    stream, collected = pickled(array)
    assert collected.views == []
    assert list(pickle.loads(stream)) == ["x", None, 3]


def test_read_only_array_stays_read_only() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    stream, collected = pickled([array, np.arange(3)])
    first, second = pickle.loads(stream, buffers=[bytearray(view) for view in collected.views])
    assert (first.flags.writeable, second.flags.writeable) == (False, True)
    assert [info.readonly for info in collected.infos] == [True, False]


def test_buffers_are_named_by_their_path_in_containers() -> None:
    shared = np.ones(3)
    _, collected = pickled({"a": shared, "rest": [np.zeros(2), {"q": np.ones((1, 2), "f4")}, shared], 7: np.zeros(1)})
    described = [(info.name, info.dtype, info.shape) for info in collected.infos]
    assert described == [("a", "<f8", [3]), ("rest.0", "<f8", [2]), ("rest.1.q", "<f4", [1, 2]), ("7", "<f8", [1])]


def test_container_that_contains_itself_is_pickled() -> None:
    loop: list[Any] = [np.ones(2)]
    loop.append(loop)
    stream, collected = pickled(loop)
    again = pickle.loads(stream, buffers=collected.views)
    assert again[1] is again


def test_containers_that_occur_many_times_are_named_once() -> None:
    nested: list[Any] = [np.ones(2)]
    for _ in range(14):
        nested = [nested] * 10
    _, collected = pickled(nested)
    assert [info.name for info in collected.infos] == [".".join("0" * 15)]


# -- torch


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "torch", torch_stand_in.module())
    return sys.modules["torch"]


def test_storage_shared_by_tensors_is_stored_once(torch: Any) -> None:
    storage = torch.UntypedStorage(contents=np.arange(200, dtype=np.uint8))
    tied = {"w": torch.Tensor(storage, "uint8", 0, 100), "v": torch.Tensor(storage, "uint8", 100, 100), "s": storage}
    stream, collected = pickled(tied)
    assert [(info.name, info.length) for info in collected.infos] == [("w", 200)]
    again = pickle.loads(stream, buffers=[bytearray(view) for view in collected.views])
    assert again["w"].storage is again["v"].storage is again["s"]
    assert again["v"].numpy()[0] == 100


def test_tensors_are_refused_over_read_only_buffers(torch: Any) -> None:
    stream, collected = pickled(torch.empty(8, dtype="uint8"))
    with pytest.raises(UsageError, match="mode c"):
        pickle.loads(stream, buffers=[view.toreadonly() for view in collected.views])


def test_tensor_of_a_device_is_refused(torch: Any) -> None:
    with pytest.raises(UsageError, match=r"call `\.cpu\(\)` first"):
        pickled(torch.Tensor(torch.UntypedStorage(8, device="cuda"), "uint8", 0, 8))


# -- directory


def info(length: int, **fields: Any) -> BufferInfo:
    return BufferInfo(**{"offset": 0, "length": length, "name": "x", "dtype": "|u1", "shape": [length], **fields})


@given(st.integers(1, 20_000), st.lists(st.integers(0, 20_000), max_size=20))
def test_placed_buffers_are_aligned_and_decoded_again(pickle: int, lengths: list[int]) -> None:
    buffers, length = layout.place(pickle, [info(one) for one in lengths])
    assert length % 4096 == 0
    assert all(one.offset % (4096 if one.length >= 4096 else 64) == 0 for one in buffers)
    directory = Directory(pickle=pickle, buffers=buffers)
    assert layout.decode(layout.encode(directory), length, "x") == directory


GOOD, LENGTH = layout.place(100, [info(5000), info(10), info(8, dtype="<f8", shape=[1])])


@pytest.mark.parametrize(
    "changes",
    [
        {"pickle": 0},
        {"pickle": 4097},
        {"pickle": 1 << 60},
        {"version": 2},
        {"format": "another"},
        {"buffers": [info(8, offset=64)]},
        {"buffers": [info(5000, offset=128)]},
        {"buffers": [info(8, offset=129)]},
        {"buffers": [info(64, offset=128), info(8, offset=128)]},
        {"buffers": [info(5000, offset=LENGTH)]},
        {"buffers": [info(8, offset=128, shape=[3])]},
        {"buffers": [info(0, offset=128, shape=[3, 0]), info(3, offset=128, shape=[0])]},
        {"buffers": [info(8, offset=128, shape=[1 << 45] * 64)]},
        {"buffers": [{"offset": -4096, "length": 1, "name": "", "dtype": "|u1", "shape": [1]}]},
        {"buffers": [{"offset": 128, "length": 1, "name": "n" * 5000, "dtype": "|u1", "shape": [1]}]},
        {"more": 1},
    ],
)
def test_hostile_directory_is_refused(changes: dict[str, Any]) -> None:
    fields = msgspec.to_builtins(Directory(pickle=100, buffers=GOOD)) | {"format": "pageferry-object"} | changes
    with pytest.raises(ImageError, match=r"^(cannot read source|source is damaged)"):
        layout.decode(msgspec.msgpack.encode(fields), LENGTH, "source")


def test_damaged_directory_is_refused_or_within_bounds() -> None:
    state, generator = layout.encode(Directory(pickle=100, buffers=GOOD)), random.Random(1)
    for _ in range(2000):
        damaged = bytearray(state[: generator.choice([len(state), generator.randrange(len(state))])])
        for _ in range(generator.randrange(3)):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        try:
            found = layout.decode(bytes(damaged), LENGTH, "source")
        except ImageError:
            continue
        for one in found.buffers:
            assert one.offset + one.length <= LENGTH
            assert math.prod(one.shape) <= max(one.length, 0) or not one.length
