"""Loading of Python objects from images (S10): the pickle at once, the buffers on demand.

An object is created over the memory of a restored arena. Every buffer is a part of that memory, which is freed with the
object and the last of its buffers.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import pickle
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

from pageferry import values
from pageferry.checkpoints.image_source import local_image
from pageferry.checkpoints.options import Memory
from pageferry.checkpoints.restore_arena import RestoredArena, open_shared
from pageferry.checkpoints.restore_options import RestoredArenaOptions
from pageferry.errors import ImageError, PageferryError, RestoreError, UnsupportedError, UsageError, WrongType
from pageferry.events import Listener, ignore
from pageferry.host import forks
from pageferry.host.blocking import asynchronous, interruptible
from pageferry.objects import dtypes, layout
from pageferry.objects.layout import BufferInfo, Directory
from pageferry.objects.pickling import Collected, ObjectPickler
from pageferry.objects.rebuild import SAFE
from pageferry.objects.transfer import share
from pageferry.stores.lazy_image import open_image_file
from pageferry.stores.options import OpenArguments
from pageferry.workloads.arena.shared import SharedArena
from pageferry.workloads.callbacks import Callback, Plain

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

Mode = Literal["r", "c", "w"]
Allow = Callable[[str], bool] | Collection[str]
"""Function that is called with a qualified name and returns whether it is permitted, or the permitted names."""


class LoadArguments(OpenArguments, total=False):
    """Keyword arguments of `load`: those for its memory, as for `restore`, and those for the arena of mode `w`, as for
    `Arena`."""

    eager: bool
    prefetch: bool
    memory: Memory
    on_pause: Callback | None
    on_resume: Plain | None
    on_moved: Plain | None
    direct_io: bool
    loop: asyncio.AbstractEventLoop | None


class _Reader(io.RawIOBase):
    """File that reads the pickle in the memory of an arena, without copying the whole pickle."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: WriteableBuffer) -> int:
        view = memoryview(target).cast("B")
        count = min(len(view), len(self._memory) - self._at)
        view[:count] = self._memory[self._at : self._at + count]
        self._at += count
        return count


class _Unpickler(pickle.Unpickler):
    """Unpickler that resolves only permitted names."""

    def __init__(self, file: io.BufferedReader, buffers: list[ReadableBuffer], allow: Allow | None) -> None:
        super().__init__(file, buffers=buffers)
        self._allow = allow

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if not (self._allow is None or qualified in SAFE or _permits(self._allow, qualified)):
            raise RestoreError(
                f"its pickle refers to {qualified}, which `allow` does not permit; add the name only if the image "
                "is trusted, or read the buffers with `pageferry.open_buffers`"
            )
        found = super().find_class(module, name)
        return found.__call__ if qualified in SAFE else found  # a pickle could set attributes of the function


def _permits(allow: Allow, qualified: str) -> bool:
    return bool(allow(qualified)) if callable(allow) else qualified in allow


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Object that has not been created yet: its pickle and its buffers, in the memory of an arena."""

    arena: RestoredArena | SharedArena
    directory: Directory
    source: Path

    def part(self, info: BufferInfo) -> memoryview:
        """Return the memory of a buffer, writable."""
        return memoryview(self.arena)[info.offset : info.offset + info.length]

    def create(self, buffers: list[ReadableBuffer], allow: Allow | None) -> Any:
        """Create the object over its buffers. Raises RestoreError, ImageError if the pickle cannot be read."""
        self.arena.ensure(0, self.directory.pickle)
        stream = _Reader(memoryview(self.arena)[: self.directory.pickle].toreadonly())
        try:
            return _Unpickler(io.BufferedReader(stream, 1 << 20), buffers, allow).load()
        except PageferryError as error:
            raise type(error)(f"cannot load {self.source}: {error}") from error
        except Exception as error:  # a pickle calls any function, which raises any error
            raise RestoreError(
                f"cannot load {self.source}: {type(error).__name__}: {error}; use the versions of the packages with "
                "which the object was dumped"
            ) from error


def open_object(
    source: str | Path, options: RestoredArenaOptions, listener: Listener, *, writable: bool = True
) -> StoredObject:
    """Restore the arena of an object with these options. `writable`: whether shared memory can be written to. Separate
    memory is allocated after the directory of the object has been checked.

    Raises ImageError.
    """
    with local_image("source", source, options.keys) as path:
        return _open_local(path, options, listener, writable)


def _open_local(path: Path, options: RestoredArenaOptions, listener: Listener, writable: bool) -> StoredObject:
    if options.memory == "shared":
        shared = open_shared(path, options, listener, writable=writable)
        return StoredObject(shared, layout.decode(shared.received_state, shared.length, path), path)
    image = interruptible(lambda: open_image_file(path, in_own_process=True))
    found = image.metadata
    if found.kind != "arena" or len(found.regions) != 1:
        raise ImageError(
            f"cannot load {path}: it is an image of {found.name}, a workload of kind {found.kind}; use an image "
            "written by `pageferry.dump`"
        )
    directory = layout.decode(image.state(), found.regions[0].length, path)
    return StoredObject(RestoredArena.from_image(image, options, listener), directory, path)


def load(
    source: str | Path,
    mode: Mode = "r",
    *,
    allow: Allow | None = None,
    listener: Listener = ignore,
    **options: Unpack[LoadArguments],
) -> Any:
    """Create the object that `dump` has written to an image. Its buffers are loaded on demand and in the background.

    `mode`: `r`: the buffers are read-only, and an object with tensors of torch is refused, because torch has no
    read-only tensors. `c`: the buffers are writable, and changes are lost with the object. `w`: as `c`, and
    `arena_of(object)` returns the arena with the buffers, which `checkpoint` can save: the new image contains the
    changed buffers, and everything else as it was loaded. Mode `w` refuses an object with a writable buffer that its
    class has copied, because changes would not be saved. A buffer that was read-only when it was dumped stays
    read-only.

    **A pickle can execute any program.** Load only images from trusted sources, or pass `allow`: a set of qualified
    names such as {"datetime.date"}, or a function that returns whether a name is permitted. Arrays of numpy need no
    name, unless their type has metadata. Permit only names that are safe with any arguments: numpy does not check the
    state of a `numpy.dtype` in a pickle. `open_buffers` reads any image without unpickling it.

    `options`: with memory="shared", all processes of this user on this host that load the image with this option share
    one copy of its buffers, which one pager process loads. In mode `c`, pages that a process writes to are private.
    Mode `w` requires separate memory, and accepts on_pause, on_resume, on_moved, direct_io and loop as `Arena` does.
    `eager`, `prefetch`, `listener`, and `key`, `key_command` and `allow_plain` for an image in a store: see `restore`.
    The image must not be moved until all buffers are loaded. The memory is freed with the last one.

    Raises ImageError if the image cannot be used, RestoreError if the object cannot be created. Also raises UsageError.

    Examples:
        >>> import numpy, pageferry
        >>> result = pageferry.dump({"x": numpy.arange(1000)}, "data.img")
        >>> data = pageferry.load("data.img", "c")  # writable; changes are lost with the object
        >>> data["x"][7] = 0
        >>> print(data["x"][6:9], pageferry.load("data.img")["x"][6:9])
        [6 0 8] [6 7 8]
    """
    values.choice("mode", mode, get_args(Mode))
    check_allow(allow)
    stored = open_object(source, _arena_options(mode, options), listener, writable=mode != "r")
    if mode == "w":
        return _load_writable(stored, allow)
    views = [stored.part(info) for info in stored.directory.buffers]
    if mode == "r":
        _share(stored.arena)
        views = [view.toreadonly() for view in views]
    return stored.create(list(views), allow)


load_async = asynchronous(load)


_OF_IMAGE = ("eager", "prefetch", "memory", "key", "key_command", "allow_plain")


def _arena_options(mode: Mode, options: LoadArguments) -> RestoredArenaOptions:
    """Return the options of the arena. Raises UsageError."""
    pausing = next((name for name in options if name not in _OF_IMAGE), None)
    if pausing is not None and mode != "w":
        raise UsageError(f"invalid `{pausing}` with `mode` {mode}: only mode w has an arena to be paused")
    if options.get("memory") == "shared" and mode == "w":
        raise UsageError("`mode` w cannot be combined with shared `memory`, which cannot be saved: use mode c, or own")
    arguments: dict[str, Any] = {**options}
    return values.options(RestoredArenaOptions, arguments)


def check_allow(allow: object) -> None:
    """Raise WrongType unless `allow` is None, a function, or a collection of names."""
    if isinstance(allow, str | bytes) or not (allow is None or callable(allow) or isinstance(allow, Collection)):
        raise WrongType("invalid `allow`: expected a set of qualified names, or a function")


# -- arenas of writable objects

_writable: weakref.WeakSet[RestoredArena] = weakref.WeakSet()
_lock = forks.Lock()


def arena_of(obj: object) -> RestoredArena:
    """Return the arena that contains the buffers of an object loaded with mode `w`. Keep the object while the arena is
    saved.

    A checkpoint of the arena saves the contents of the buffers as they are at the snapshot point. It does not save
    other changes of the object: added keys, Python strings. `load` reads the new image; with the loaded image as its
    `parent`, the new image contains only changed pages. The object must not change during the call.

    Raises UsageError if the object has a writable buffer that is not in the arena, such as an array that the program or
    its library has replaced by a copy, or buffers in several arenas or in none.

    Examples:
        >>> import numpy, pageferry
        >>> result = pageferry.dump({"x": numpy.arange(1000)}, "data.img")
        >>> data = pageferry.load("data.img", "w")
        >>> data["x"][7] = 0
        >>> result = pageferry.checkpoint(pageferry.arena_of(data), "changed.img", parent="data.img")
        >>> print(pageferry.load("changed.img")["x"][6:9])
        [6 0 8]
    """
    collected = Collected()
    ObjectPickler(_Sink(), collected, {}).dump(obj)
    with _lock:
        known = list(_writable)
    buffers = zip(collected.views, collected.infos, strict=True)
    found = {_containing(known, _address(view)) for view, info in buffers if info.length and not info.readonly}
    if len(found) == 1 and (arena := found.pop()) is not None:
        return arena
    cause = "it has no writable buffer" if not found else "not all of its writable buffers are in one arena"
    raise UsageError(
        f"cannot find the arena of an object of type {type(obj).__name__}: {cause}; pass an object returned by "
        '`pageferry.load(..., mode="w")` or a part of it, and use `pageferry.dump` after arrays were replaced'
    )


def _containing(arenas: list[RestoredArena], address: int) -> RestoredArena | None:
    """Return the arena that contains an address; None if there is none."""
    return next((one for one in arenas if one.address <= address < one.address + one.length), None)


def _load_writable(stored: StoredObject, allow: Allow | None) -> Any:
    """Create an object whose writable buffers are all in the arena. Raises UsageError."""
    numpy = dtypes.numpy_for("mode w")
    exporters = [numpy.frombuffer(stored.part(info), numpy.uint8) for info in stored.directory.buffers]
    watched = [weakref.ref(exporter) for exporter in exporters]
    created = stored.create([memoryview(exporter) for exporter in exporters], allow)
    del exporters
    known = zip(stored.directory.buffers, watched, strict=True)
    copied = [info for info, watch in known if watch() is None and info.length and not info.readonly]
    if copied or not any(info.length and not info.readonly for info in stored.directory.buffers):
        cause = f"{len(copied)} of its buffers were copied ({copied[0].name})" if copied else "it has none"
        raise UsageError(
            f"cannot load {stored.source} with mode w: {cause}, so changes would not be saved; use mode c, and "
            "dump the changed object"
        )
    assert isinstance(stored.arena, RestoredArena)
    with _lock:
        _writable.add(stored.arena)
    _share(stored.arena)
    return created


def _share(arena: RestoredArena | SharedArena) -> None:
    """Pickle the arrays of a loaded object as handles, unless numpy is not installed."""
    with contextlib.suppress(UnsupportedError):
        share(arena)


class _Sink(io.RawIOBase):
    """File that discards all data written to it."""

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        return memoryview(data).nbytes


def _address(view: memoryview) -> int:
    return int(dtypes.numpy_for("arena_of").frombuffer(view, "u1").__array_interface__["data"][0])
