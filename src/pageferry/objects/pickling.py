"""Pickling of objects with their buffers out of band (pickle protocol 5, PEP 574).

Classes that support protocol 5 (pandas, pyarrow, scipy) pass their buffers to the pickler. This module reduces other
classes: numpy copies arrays that are not contiguous, dates and masked arrays into the pickle, and polars and torch copy
all data. A storage that several tensors of torch share is stored once.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pageferry.errors import UsageError
from pageferry.objects import dtypes, rebuild
from pageferry.objects.layout import MAX_BUFFERS, BufferInfo

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

MAX_NAMED = 100_000
"""Maximum number of objects in containers that are given a name."""
MAX_NAME = 200
"""Maximum length of a name, characters."""

BYTES = "|u1"


@dataclass
class Collected:
    """Buffers of an object, in the order of its pickle."""

    views: list[memoryview] = field(default_factory=list)
    """Contents of each buffer as bytes."""
    infos: list[BufferInfo] = field(default_factory=list)
    """Description of each buffer; offsets are not assigned yet."""


class ObjectPickler(pickle.Pickler):
    """Pickler that collects the buffers of an object. Raises UsageError for too many buffers, or for a tensor that is
    not in the memory of the host."""

    def __init__(self, file: SupportsWrite[bytes], collected: Collected, names: Mapping[int, str]) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._collect)
        self._collected = collected
        self._names = names
        self._name = ""
        """Name of the object that is being pickled."""
        self._arrays: dict[int, tuple[str, list[int], Literal["C", "F"]]] = {}
        """Type, shape and order of arrays, by the id of their PickleBuffer."""
        self._storages: dict[tuple[int, int], _Storage] = {}
        self._kept: list[object] = []
        """Objects whose ids are keys."""

    def reducer_override(self, obj: Any) -> Any:
        """Reduce arrays and storages, so that their buffers are out of band."""
        self._name = self._names.get(id(obj), self._name)
        if isinstance(obj, _Storage):
            return rebuild.torch_storage, (pickle.PickleBuffer(obj.contents),)
        kind = type(obj)
        reduce = self._reducers.get((kind.__module__.partition(".")[0], kind.__name__))
        if reduce is not None and _is_class(kind):
            return reduce(self, obj)
        return NotImplemented

    def _reduce_array(self, array: Any) -> Any:
        if array.dtype.hasobject:
            return NotImplemented
        import numpy

        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        flat = _bytes(numpy.asarray(array, order=order))
        flat.flags.writeable &= array.flags.writeable
        buffer = pickle.PickleBuffer(flat)
        self._arrays[id(buffer)] = (dtypes.to_text(array.dtype), list(array.shape), order)
        self._kept.append(buffer)
        return rebuild.array, (buffer, dtypes.to_text_or_dtype(array.dtype), array.shape, order)

    def _reduce_masked(self, array: Any) -> Any:
        return rebuild.masked_array, (array.data, array.mask, array.fill_value)

    def _reduce_typed_storage(self, storage: Any) -> Any:
        untyped = getattr(storage, "_untyped_storage", None)
        untyped = storage.untyped() if untyped is None else untyped
        return rebuild.torch_typed_storage, (self._storage(untyped), storage.dtype)

    def _reduce_untyped_storage(self, storage: Any) -> Any:
        return rebuild.torch_untyped_storage, (self._storage(storage),)

    def _reduce_polars_frame(self, frame: Any) -> Any:
        """Reduce a data frame to a table of pyarrow, unless pyarrow is missing or does not preserve the types."""
        try:
            import polars
            import pyarrow
        except ImportError:
            return NotImplemented
        try:
            table = frame.to_arrow(compat_level=polars.CompatLevel.newest())
            again: Any = polars.from_arrow(table)
            same = again.schema == frame.schema
        except (pyarrow.ArrowException, polars.exceptions.PolarsError, TypeError, AttributeError):
            return NotImplemented
        return (rebuild.polars_frame, (table,)) if same else NotImplemented

    _reducers: Mapping[tuple[str, str], Callable[[ObjectPickler, Any], Any]] = {
        ("numpy", "ndarray"): _reduce_array,
        ("numpy", "memmap"): _reduce_array,
        ("numpy", "MaskedArray"): _reduce_masked,
        ("polars", "DataFrame"): _reduce_polars_frame,
        ("torch", "TypedStorage"): _reduce_typed_storage,
        ("torch", "UntypedStorage"): _reduce_untyped_storage,
    }

    def _storage(self, storage: Any) -> _Storage:
        """Return the record of an untyped storage, the same one for all tensors that share it."""
        if storage.device.type != "cpu":
            raise UsageError(
                f"cannot dump a tensor on {storage.device}: its memory is not in the host; call `.cpu()` first"
            )
        key = (storage.data_ptr(), storage.nbytes())
        if key not in self._storages:
            import torch

            view = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[key] = _Storage(view.numpy())
        return self._storages[key]

    def _collect(self, buffer: pickle.PickleBuffer) -> None:
        view = buffer.raw()
        if len(self._collected.views) >= MAX_BUFFERS:
            raise UsageError(f"cannot dump an object with more than {MAX_BUFFERS} buffers; concatenate small arrays")
        dtype, shape, order = self._arrays.get(id(buffer), (BYTES, [view.nbytes], "C"))
        self._collected.views.append(view)
        self._collected.infos.append(
            BufferInfo(
                offset=0,
                length=view.nbytes,
                name=self._name,
                dtype=dtype,
                shape=shape,
                order=order,
                readonly=view.readonly or type(view.obj).__module__.partition(".")[0] == "pyarrow",
            )
        )


@dataclass(eq=False)
class _Storage:
    """Storage of torch that is being pickled. The pickler stores each object once, and therefore each storage once."""

    contents: Any


def names_of(obj: object) -> dict[int, str]:
    """Return names for the objects in the dicts, lists and tuples of `obj`, by their ids: the path of keys, with dots.
    The first name of an object applies."""
    names: dict[int, str] = {}
    for path, leaf in _walk(obj, "", set()):
        if len(names) >= MAX_NAMED:
            break
        names.setdefault(id(leaf), path[:MAX_NAME])
    return names


def _walk(obj: object, path: str, seen: set[int], depth: int = 16) -> Iterator[tuple[str, object]]:
    """Yield the objects in containers with their paths. `seen`: ids of containers whose objects have names."""
    if isinstance(obj, dict):
        items = [(str(key), value) for key, value in list(obj.items()) if isinstance(key, str | int)]
    elif isinstance(obj, list | tuple):
        items = [(str(number), value) for number, value in enumerate(obj)]
    else:
        if path:
            yield path, obj
        return
    if id(obj) in seen:
        return
    seen.add(id(obj))
    for key, value in items:
        if depth and not isinstance(value, str | bytes | int | float | None):
            yield from _walk(value, f"{path}.{key}" if path else key, seen, depth - 1)


def _is_class(kind: type) -> bool:
    """Return whether `kind` is the class that its module publishes under its name, and not another class of this
    name."""
    package = sys.modules.get(kind.__module__.partition(".")[0])
    places = (package, sys.modules.get(kind.__module__), getattr(package, "ma", None))
    return any(getattr(place, kind.__name__, None) is kind for place in places)


def _bytes(contents: Any) -> Any:
    """Return the bytes of a contiguous array as an array. Arrays of dates do not support the buffer protocol."""
    import numpy

    if contents.dtype.itemsize == 0 or contents.size == 0:
        return numpy.empty(0, numpy.uint8)
    flat = contents.reshape(-1, order="A").view(numpy.ndarray)
    return flat.view(f"V{flat.dtype.itemsize}").view(numpy.uint8)
