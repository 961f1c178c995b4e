"""Tests, with pickles made by an attacker, of the functions that every allow-list contains."""

from __future__ import annotations

import io
import pickle
import struct
import sys
from typing import Any

import numpy as np
import pytest

from pageferry.errors import RestoreError
from pageferry.objects import dtypes, rebuild
from pageferry.objects.load import _Reader, _Unpickler
from pageferry.objects.rebuild import SAFE
from tests import torch_stand_in

MODULE = "pageferry.objects.rebuild"


def unpickled(stream: bytes) -> Any:
    """Unpickle with the names in every allow-list."""
    return _Unpickler(io.BufferedReader(_Reader(memoryview(stream))), [], set()).load()


def named(name: str) -> bytes:
    """Return opcodes that push a function of the module."""
    return f"c{MODULE}\n{name}\n".encode()


def pushed(obj: object) -> bytes:
    """Return opcodes that push an object."""
    return pickle.dumps(obj, 3)[2:-1]


def call(name: str, *arguments: object) -> bytes:
    return b"\x80\x05" + named(name) + pushed(arguments) + b"R."


def hostile_dtype(code: str, state: tuple[Any, ...]) -> Any:
    """Return a type whose state is set as a pickle can set it."""
    found: Any = np.dtype.__new__(np.dtype, code, False, True)
    found.__setstate__(state)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        (bytes(8), "O", (1,), "C"),
        (bytes(8), "|O8", (1,), "C"),
        (bytes(16), "T", (1,), "C"),
        (bytes(8), "[('a', 'O')]", (1,), "C"),
        (bytes(8), [("a", "O")], (1,), "C"),
        (bytes(8), {"names": ["a"], "formats": ["O"]}, (1,), "C"),
        (bytes(8), ("O", (1,)), (1,), "C"),
        (bytes(8), "O,i4", (0,), "C"),
        (bytes(8), "[" * 5000, (1,), "C"),
        (bytes(8), None, (1,), "C"),
        (bytes(8), "f8", (2,), "C"),
        (bytes(8), "f8", (-1,), "C"),
        (bytes(8), "f8", (-1, -1), "C"),
        (bytes(8), "f8", (1 << 62, 4), "C"),
        (bytes(8), "f8", (0, 1 << 60), "C"),
        (bytes(8), "f8", (1 << 100000,), "C"),
        (bytes(8), "f8", (1,) * 65, "C"),
        (bytes(8), "f8", [1], "C"),
        (bytes(8), "f8", (True,), "C"),
        (bytes(8), "f8", ("1",), "C"),
        (bytes(8), "f8", 1, "C"),
        (bytes(8), "f8", (1,), "A"),
        (bytes(8), "f8", (1,), None),
        ("text", "u1", (1,), "C"),
        (None, "u1", (1,), "C"),
        (1 << 40, "u1", (1,), "C"),
        ([1, 2], "u1", (1,), "C"),
    ],
    ids=range(27),
)
def test_array_with_hostile_arguments_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((RestoreError, ValueError)):
        unpickled(call("array", *arguments))


def test_array_over_an_array_of_objects_is_refused() -> None:
    with pytest.raises(RestoreError, match="over a buffer of type ndarray"):
        rebuild.array(np.array([object], object), "u1", (8,), "C")
    with pytest.raises(RestoreError, match="does not consist of bytes"):
        rebuild.array(np.array([object], object).data, "u1", (8,), "C")


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("O", (3, "|", None, None, None, 8, 8, 0)),
        ("V4", (3, "|", None, ("a",), {"a": (np.dtype("f8"), 1000)}, 4, 1, 0)),
        ("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)),
        ("V8", (3, "|", (np.dtype("f8"), (1000,)), None, None, 8, 1, 0)),
    ],
)
def test_array_of_a_permitted_type_with_a_hostile_state_is_refused(code: str, state: tuple[Any, ...]) -> None:
    kind = hostile_dtype(code, state)
    assert not kind.hasobject
    with pytest.raises((RestoreError, ValueError)):
        rebuild.array(bytes(8), kind, (1,), "C")


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype([("a", "i1"), ("b", "f8")], align=True),
        np.dtype((np.record, [("a", "i4")])),
        np.dtype("f8", metadata={"unit": "m"}),
        np.dtype([(("title", "a"), "f8", (2,)), ("b", [("c", "S3")])]),
        np.dtype({"names": ["a"], "formats": ["i4"], "offsets": [2], "itemsize": 9}),
        np.dtype("V0"),
        np.dtype("M8[25s]"),
        np.dtype(">u2"),
    ],
    ids=repr,
)
def test_array_of_a_permitted_type_is_created_with_this_type(dtype: Any) -> None:
    for given in (dtype, dtypes.to_text_or_dtype(dtype)):
        found = rebuild.array(bytes(dtype.itemsize), given, (1,), "C").dtype
        assert (found, found.type, found.metadata) == (dtype, dtype.type, dtype.metadata)
        assert repr(found) == repr(dtype)


def test_pickle_cannot_move_the_buffer_of_an_array() -> None:
    buffer = b"\x96" + struct.pack("<Q", 16) + bytes(16) + b"qM"
    created = named("array") + b"(hM" + pushed("u1") + pushed((16,)) + pushed("C") + b"tR"
    longer = b"hM(" + b"K\x01" * 100_000 + b"e"
    with pytest.raises(BufferError, match="cannot be re-sized"):
        unpickled(b"\x80\x05" + buffer + created + longer + b"\x86.")


def test_pickle_cannot_change_a_function() -> None:
    stream = b"\x80\x05" + named("array") + pushed((None, {"__qualname__": "system"})) + b"b."
    with pytest.raises(AttributeError):
        unpickled(stream)
    assert rebuild.array.__qualname__ == "array"


EMPTY = rebuild.array(b"", "V0", (1 << 40,), "C")
"""Array of many elements without memory."""
PAIR = rebuild.array(bytes(16), "f8", (2,), "C")


@pytest.mark.parametrize(
    ("data", "mask", "fill_value"),
    [
        ([1, 2], np.False_, 0),
        ("text", np.False_, 0),
        (PAIR, True, 0),
        (PAIR, np.True_, 0),
        (PAIR, [True, False], 0),
        (EMPTY, True, 0),
        (PAIR, np.zeros(3, bool), 0),
        (PAIR, np.zeros(2, "u1"), 0),
        (PAIR, np.False_, EMPTY),
    ],
    ids=range(9),
)
def test_masked_array_with_hostile_arguments_is_refused(data: Any, mask: Any, fill_value: Any) -> None:
    with pytest.raises(RestoreError):
        rebuild.masked_array(data, mask, fill_value)


@pytest.mark.parametrize("value", [None, b"", "text", 1, (), [], {}, PAIR, bytes(8)], ids=repr)
def test_storages_of_torch_refuse_other_objects(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = torch_stand_in.module()
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(RestoreError):
        rebuild.torch_untyped_storage(value)
    with pytest.raises(RestoreError):
        rebuild.torch_typed_storage(value, torch.uint8)
    with pytest.raises(RestoreError):
        rebuild.torch_typed_storage(torch.UntypedStorage(8), object())
    if type(value) is not bytes:
        with pytest.raises(RestoreError):
            rebuild.torch_storage(value)


@pytest.mark.parametrize("value", [None, b"", "text", {"a": [1]}, [[1]], PAIR], ids=repr)
def test_data_frame_refuses_other_objects_than_tables(value: Any) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(RestoreError, match="without a table"):
        rebuild.polars_frame(value)


@pytest.mark.parametrize("name", sorted(SAFE))
def test_every_function_refuses_a_wrong_number_of_arguments(name: str) -> None:
    for count in (0, 9):
        with pytest.raises(TypeError):
            unpickled(call(name.rpartition(".")[2], *[None] * count))
