"""Handles of arrays in pickles of multiprocessing: arrays in arenas are shared, all others are copied.

The arrays of `Arrays`, and the read-only and writable (mode `w`) arrays of loaded objects, are pickled without their
contents: a pickle contains a handle of the arena, and the offset, type, shape, strides and writability of the array.
The other process maps the arena once, for all of its arrays. If the memory is shared with its image, the handle names
the image, and the other process shares the same copy.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

from pageferry.errors import WorkloadError
from pageferry.host import forks
from pageferry.objects import dtypes
from pageferry.workloads import handles
from pageferry.workloads.arena.shared import attach_shared
from pageferry.workloads.handle import Handle, SharedHandle
from pageferry.workloads.handles import Handed, attach_handle

_shared: weakref.WeakSet[Any] = weakref.WeakSet()
"""Arenas whose arrays are pickled as handles."""
_lock = forks.Lock()


def share(arena: Handed) -> None:
    """Pickle arrays in this arena as handles from now on."""
    numpy = dtypes.numpy_for("arrays in arenas")
    with _lock:
        _shared.add(arena)
    # Arrays, unlike arenas, cannot be reduced unless their reducer is registered before the first pickle.
    importlib.import_module("multiprocessing.reduction")
    handles.register(numpy.ndarray, _reduce)


def _reduce(array: Any) -> Any:
    """Reduce an array to a handle if it lies in a shared arena; otherwise copy it, as numpy does."""
    if not array.size or array.dtype.hasobject:
        return array.__reduce_ex__(2)
    first, end = _bounds(array)
    arena = handles.containing(first, end - first)
    with _lock:
        shared = arena is not None and arena in _shared
    if not shared or arena is None:
        return array.__reduce_ex__(2)
    offset = int(array.__array_interface__["data"][0]) - arena.address
    layout = (offset, dtypes.to_text(array.dtype), array.shape, array.strides, bool(array.flags.writeable))
    return attach_array, (arena.handle(), layout)


def _bounds(array: Any) -> tuple[int, int]:
    """Return the first address of an array, and the address after its last element."""
    start = int(array.__array_interface__["data"][0])
    spans = [(count - 1) * stride for count, stride in zip(array.shape, array.strides, strict=True)]
    first = start + sum(span for span in spans if span < 0)
    return first, start + sum(span for span in spans if span > 0) + array.dtype.itemsize


def attach_array(handle: Handle | SharedHandle, layout: tuple[int, str, tuple[int, ...], tuple[int, ...], bool]) -> Any:
    """Return the array in the memory of a handle. Raises WorkloadError, WorkloadDied."""
    numpy = dtypes.numpy_for("arrays in arenas")
    offset, dtype, shape, strides, writable = layout
    arena = attach_shared(handle) if isinstance(handle, SharedHandle) else attach_handle(handle)
    memory = memoryview(arena)
    try:
        exporter = numpy.frombuffer(memory if writable else memory.toreadonly(), numpy.uint8)
        array = numpy.ndarray(shape, dtypes.from_text(dtype), buffer=exporter, offset=offset, strides=strides)
    except (TypeError, ValueError) as error:
        raise WorkloadError(f"cannot attach an array of {handle.name}: {error}; pass the array again") from error
    share(arena)
    return array
