"""Reading of the buffers of an object in an image without unpickling it, for images from untrusted sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack

from pageferry import values
from pageferry.checkpoints.options import Memory
from pageferry.checkpoints.restore_options import RestoredArenaOptions
from pageferry.errors import ImageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import asynchronous
from pageferry.objects import dtypes
from pageferry.objects.layout import BufferInfo
from pageferry.objects.load import StoredObject, open_object
from pageferry.stores.options import OpenArguments


class StoredBuffer:
    """Buffer of an object in an image. Its contents are loaded on demand."""

    def __init__(self, stored: StoredObject, info: BufferInfo) -> None:
        self._stored = stored
        self._info = info

    @property
    def name(self) -> str:
        """Path of the owner in the containers of the object, such as `weights.0`; empty if unknown."""
        return self._info.name

    @property
    def dtype(self) -> str:
        """Type of the elements, such as `<f8`; `|u1` for buffers of classes other than arrays of numpy."""
        return self._info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self._info.shape)

    @property
    def nbytes(self) -> int:
        """Length, bytes."""
        return self._info.length

    def memory(self) -> memoryview:
        """Return the contents as bytes, read-only, without copying."""
        return self._stored.part(self._info).toreadonly()

    def array(self) -> Any:
        """Return the contents as a read-only array of numpy, without copying. Raises ImageError if the type is invalid
        or does not match the length, UnsupportedError without numpy."""
        numpy = dtypes.numpy_for("StoredBuffer.array")
        try:
            dtype = dtypes.from_text(self.dtype)
            return numpy.ndarray(self.shape, dtype, buffer=self.memory(), order=self._info.order)
        except (TypeError, ValueError, MemoryError) as error:
            raise ImageError(
                f"cannot read buffer {self.name!r} of {self._stored.source} as an array: {error}; use memory()"
            ) from error

    def __repr__(self) -> str:
        return f"<StoredBuffer {self.name!r}: {self.dtype} {list(self.shape)}, {self.nbytes} bytes>"


class StoredBuffers(Mapping[str, StoredBuffer]):
    """Buffers of an object in an image, by name, in the order of the object. A buffer without a name, or with the name
    of an earlier one, has a number instead: `#0` for the first buffer of the image, or `##0` if a buffer has the name
    `#0`."""

    def __init__(self, stored: StoredObject) -> None:
        self._stored = stored
        self._buffers: dict[str, StoredBuffer] = {}
        stored_names = {info.name for info in stored.directory.buffers}
        for number, info in enumerate(stored.directory.buffers):
            name = info.name
            if not name or name in self._buffers:
                name = f"#{number}"
                while name in stored_names:
                    name = f"#{name}"
            self._buffers[name] = StoredBuffer(stored, info)

    def __getitem__(self, name: str) -> StoredBuffer:
        return self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def pickle(self) -> memoryview:
        """Return the pickle of the object, read-only. Unpickling it can execute any program."""
        return memoryview(self._stored.arena)[: self._stored.directory.pickle].toreadonly()

    def __repr__(self) -> str:
        return f"<StoredBuffers of {self._stored.source}: {len(self)}>"


def open_buffers(
    source: str | Path,
    *,
    eager: bool = False,
    prefetch: bool = True,
    memory: Memory = "own",
    listener: Listener = ignore,
    **keys: Unpack[OpenArguments],
) -> StoredBuffers:
    """Open the buffers of an object in an image without unpickling the object: names, types, shapes and contents.

    This is safe for images from untrusted sources. `eager`, `prefetch`, `memory`, `listener`, and `key`, `key_command`
    and `allow_plain`: see `load`. Raises ImageError if the image cannot be used, UsageError.

    Examples:
        >>> import numpy, pageferry
        >>> result = pageferry.dump({"x": numpy.arange(1000)}, "data.img")
        >>> buffers = pageferry.open_buffers("data.img")
        >>> print(buffers["x"].dtype, buffers["x"].shape, buffers["x"].array()[7])
        <i8 (1000,) 7
    """
    chosen: dict[str, Any] = {"eager": eager, "prefetch": prefetch, "memory": memory, **keys}
    options = values.options(RestoredArenaOptions, chosen)
    return StoredBuffers(open_object(source, options, listener, writable=False))


open_buffers_async = asynchronous(open_buffers)
