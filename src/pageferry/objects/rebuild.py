"""Functions that pickles of `pageferry.dump` call to create objects from their buffers.

Pickles refer to these functions by name, so names and parameters must not change. Every allow-list contains the
functions, so an attacker can call them with any arguments. They refuse all arguments that `dump` does not write, before
memory is allocated or accessed. They lock the buffers, because a pickle can append to a bytearray, which would move its
memory.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from pageferry.errors import RestoreError, UsageError
from pageferry.objects import dtypes

MAX_AXES = 64
MAX_LENGTH = 1 << 46
"""Maximum length of an axis."""
MAX_TEXT = 65536
"""Maximum length of the text of a type, characters."""


def array(buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> Any:
    """Return a numpy array over a buffer, without copying. The array is writable if the buffer is. `dtype`: a dtype, or
    its text (see `dtypes`).

    Raises RestoreError for a type of Python objects, and for a shape that is longer than the buffer.
    """
    import numpy

    memory, kind = _memory(buffer), _dtype(dtype)
    if type(shape) is not tuple or len(shape) > MAX_AXES:
        _refuse("an array with an invalid shape")
    if not all(type(one) is int and 0 <= one <= MAX_LENGTH for one in shape):
        _refuse("an array with an invalid shape")
    if math.prod(shape) * kind.itemsize > memory.nbytes:
        _refuse(f"an array that is longer than its buffer of {memory.nbytes} bytes")
    if type(order) is not str or order not in ("C", "F"):
        _refuse("an array with an invalid order")
    checked: Any = order
    exporter = numpy.frombuffer(memory, numpy.uint8)  # keeps the buffer locked, which numpy.ndarray does not
    return numpy.ndarray(shape, kind, buffer=exporter, order=checked)


def masked_array(data: Any, mask: Any, fill_value: Any) -> Any:
    """Return a masked array over an array and its mask, without copying. Raises RestoreError for other arguments."""
    import numpy

    if not isinstance(data, numpy.ndarray):
        _refuse("a masked array without an array")
    if isinstance(mask, numpy.ndarray):
        if mask.shape != data.shape or mask.dtype != numpy.ma.make_mask_descr(data.dtype):
            _refuse("a masked array whose mask does not match")
    elif mask is not numpy.ma.nomask:
        _refuse("a masked array with an invalid mask")
    if isinstance(fill_value, numpy.ndarray) and fill_value.ndim:
        _refuse("a masked array with an array as fill value")
    return numpy.ma.MaskedArray(data, mask=mask, fill_value=fill_value, copy=False)


def torch_storage(buffer: Any) -> Any:
    """Return an untyped storage of torch over a buffer, without copying. Raises UsageError for a read-only buffer."""
    import torch

    memory = _memory(buffer)
    if memory.readonly:
        raise UsageError(
            "cannot create a read-only tensor: torch does not support this; load the object with mode c or w"
        )
    if not memory.nbytes:
        return torch.UntypedStorage(0)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def torch_untyped_storage(storage: Any) -> Any:
    """Return an untyped storage, which typed storages of the same object may share. Raises RestoreError."""
    import torch

    if not isinstance(storage, torch.UntypedStorage):
        _refuse("a storage of torch without its memory")
    return storage


def torch_typed_storage(storage: Any, dtype: Any) -> Any:
    """Return a typed storage of torch, which refers to an untyped one. Raises RestoreError."""
    import torch

    if not isinstance(dtype, torch.dtype):
        _refuse("a storage of torch with an invalid type")
    return torch.storage.TypedStorage(wrap_storage=torch_untyped_storage(storage), dtype=dtype, _internal=True)


def polars_frame(table: Any) -> Any:
    """Return a data frame of polars over a table of pyarrow. The lengths of its buffers are checked, but not their
    contents, which are not loaded yet. Raises RestoreError."""
    import pyarrow

    if not isinstance(table, pyarrow.Table):
        _refuse("a data frame of polars without a table of pyarrow")
    table.validate()
    import polars

    return polars.from_arrow(table)


def _memory(buffer: Any) -> memoryview:
    """Return a buffer as bytes, which stay in place as long as the view exists. Raises RestoreError."""
    if type(buffer) not in (bytes, bytearray, memoryview):
        _refuse(f"an object over a buffer of type {type(buffer).__name__:.60}")
    memory = memoryview(buffer)
    if memory.format != "B" or memory.ndim != 1 or not memory.c_contiguous:
        _refuse("an object over a buffer that does not consist of bytes")
    return memory


def _dtype(dtype: Any) -> Any:
    """Return a type as numpy itself creates it. Raises RestoreError for a type of Python objects.

    numpy does not check the state of a dtype in a pickle: the state may hide Python objects, or fields outside of the
    element.
    """
    import numpy

    if type(dtype) is str and len(dtype) <= MAX_TEXT:
        return dtypes.from_text(dtype)
    if not isinstance(dtype, numpy.dtype):
        _refuse("an array with an invalid type")
    if dtype.hasobject or (found := _copied(dtype)).hasobject or found.itemsize != dtype.itemsize:
        _refuse("an array of Python objects, or of a damaged type")
    return found


def _copied(dtype: Any) -> Any:
    """Return a type that numpy creates again from the parts of another one."""
    import numpy

    if not isinstance(dtype, numpy.dtype):
        _refuse("an array with an invalid type")
    parts: Any = dtype.str if dtype.names is None else _fields(dtype)
    if dtype.subdtype is not None:
        parts = (_copied(dtype.subdtype[0]), dtype.subdtype[1])
    found: Any = numpy.dtype(parts, metadata=dict(dtype.metadata)) if dtype.metadata else numpy.dtype(parts)
    return numpy.dtype((numpy.record, found)) if dtype.type is numpy.record else found


def _fields(dtype: Any) -> dict[str, Any]:
    """Return the parts of a structured type, as numpy expects them."""
    fields = [dtype.fields[name] for name in dtype.names]
    return {
        "names": list(dtype.names),
        "formats": [_copied(field[0]) for field in fields],
        "offsets": [field[1] for field in fields],
        "titles": [field[2] if len(field) > 2 else None for field in fields],
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
    }


def _refuse(cause: str) -> NoReturn:
    raise RestoreError(f"its pickle describes {cause}; load only images that `pageferry.dump` has written")


_NAMES = ("array", "masked_array", "polars_frame", "torch_storage", "torch_typed_storage", "torch_untyped_storage")

SAFE = {f"{__name__}.{name}" for name in _NAMES}
"""Qualified names of the functions, which every allow-list contains."""
