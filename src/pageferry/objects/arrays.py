"""Named arrays of numpy in one arena, which also contains their directory and the free memory.

A checkpoint, a restore or a migration of the arena therefore contains everything; `Arrays.restore` and `Arrays.over`
return the mapping again.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from pageferry import values
from pageferry.checkpoints.options import Memory
from pageferry.checkpoints.restore_arena import RestoredArena, open_arena
from pageferry.checkpoints.restore_options import RestoreArguments
from pageferry.errors import UsageError, WorkloadError
from pageferry.events import Listener, ignore
from pageferry.memory.regions import SMALL_PAGE
from pageferry.objects import array_directory, dtypes
from pageferry.objects.array_directory import HEADER, ArrayInfo, DirectoryView, Entries
from pageferry.objects.extents import Extents
from pageferry.objects.transfer import share
from pageferry.workloads import handles
from pageferry.workloads.arena.arena import Arena
from pageferry.workloads.arena.limits import MAX_ARENA
from pageferry.workloads.arena.options import ArenaArguments
from pageferry.workloads.arena.shared import SharedArena
from pageferry.workloads.handle import Handle
from pageferry.workloads.handles import AttachedArena

if TYPE_CHECKING:
    import numpy
    from numpy.typing import ArrayLike, DTypeLike

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

Shape = int | tuple[int, ...]

_opened: weakref.WeakValueDictionary[Arena | AttachedArena | SharedArena, Arrays] = weakref.WeakValueDictionary()
"""The only mapping of each arena in this process: two mappings would not know which extents the other one has
allocated."""


def _after_fork() -> None:
    """Replace locks, which a thread of the parent may have held."""
    for one in list(_opened.values()):
        one._lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


class Arrays(MutableMapping[str, "Array"]):
    """Mapping from names to arrays of numpy in one arena, which can be saved and migrated while it is in use.

    Parameters: `size` is the total size in bytes, or a text such as `8GiB`; `name` and `options` are those of `Arena`.
    With `capacity`, the arena grows up to this size when an array needs more memory.

    Operations of the mapping are thread-safe, and each changes the directory with a single store: a checkpoint at any
    moment contains the arrays before or after an operation. The contents of arrays are not protected: pass `on_pause`
    if other threads write to them during a checkpoint, as for any arena.

    An array is a view of the memory: torch.from_dlpack and pyarrow.py_buffer use it without copying. After `del`,
    replacement or a resize that moves the array, older views stay valid, and keep their memory until the last of them
    is deleted. Arrays are stored in C order; types that contain Python objects are refused.

    Only the process that created the object can add, delete or resize arrays. Other processes (children after fork, or
    by a handle, see `pageferry.attach`) can use existing arrays; an array must not be deleted or resized while another
    process uses it.

    Raises UsageError for an invalid size or name, NameInUse, UnsupportedError without numpy.

    Examples:
        >>> import numpy, pageferry
        >>> table = pageferry.Arrays("64MiB")  # memory is allocated on first access
        >>> x = table.empty("x", (1000, 100), "f4")  # a view of the arena
        >>> x[:] = 1.0
        >>> table["y"] = numpy.arange(10)  # a copy
        >>> result = pageferry.checkpoint(table, "table.img")
        >>> again = pageferry.Arrays.restore("table.img")  # returns before the contents are loaded
        >>> print(list(again), again["x"].sum(), again["y"][7])
        ['x', 'y'] 100000.0 7
    """

    def __init__(self, size: int | str, name: str | None = None, **options: Unpack[ArenaArguments]) -> None:
        dtypes.numpy_for("pageferry.Arrays")
        chosen = values.size("size", size, 2 * SMALL_PAGE, MAX_ARENA)
        arena = Arena(chosen, **options)
        DirectoryView(memoryview(arena)).format()
        self._open(arena)
        if name is not None:
            arena.register(name)

    @classmethod
    def over(cls, arena: Arena | AttachedArena | SharedArena) -> Self:
        """Return the arrays in an arena of a `pageferry.Arrays` that was received, restored, attached or created by
        this process.

        Raises UsageError if the arena contains no arrays, ImageError if their directory is damaged.
        """
        values.instance("arena", arena, Arena, AttachedArena, SharedArena)
        if (known := _opened.get(arena)) is not None and isinstance(known, cls):
            return known
        dtypes.numpy_for("pageferry.Arrays")
        if isinstance(arena, Arena):
            arena.check_here()
        self = cls.__new__(cls)
        self._open(arena)
        return self

    @classmethod
    def restore(
        cls,
        path: str | Path,
        name: str | None = None,
        *,
        memory: Memory = "own",
        listener: Listener = ignore,
        **options: Unpack[RestoreArguments],
    ) -> Self:
        """Create the arrays from an image. The parameters are those of `pageferry.restore`. With memory="shared",
        processes share the memory of the image; arrays that this process adds or changes are private, and cannot be
        saved.

        Raises ImageError if the image cannot be used, UsageError if it contains no arrays.
        """
        arena = open_arena(path, name, memory, listener, options)
        try:
            return cls.over(arena)
        except BaseException:
            if isinstance(arena, RestoredArena):
                arena.close()
            raise

    def _open(self, arena: Arena | AttachedArena | SharedArena) -> None:
        self._arena = arena
        self._owner = arena.owner if isinstance(arena, AttachedArena) else os.getpid()
        self._lock = threading.RLock()
        self._view = DirectoryView(memoryview(arena))
        self._view.check()
        self._version, self._entries, self._root_length = self._view.latest()
        used = [(info.offset, info.capacity) for info in self._entries.values()]
        try:
            self._extents = Extents(HEADER, len(arena), [*used, (self._version.root or HEADER, self._root_length)])
        except ValueError as error:
            raise array_directory._damaged(str(error)) from error
        self._exporters: dict[int, weakref.ref[Array]] = {}
        """Array of bytes over each extent in use by views, by offset. The views refer to this array."""
        _opened[arena] = self
        if not isinstance(arena, SharedArena):  # a worker would not see the private pages of this process
            share(arena)
        handles.register(type(self), _reduce)
        self._unused: deque[tuple[int, int]] = deque()
        """Extents of deleted arrays that have no views left. The garbage collector appends to this queue at any time,
        so it has no lock."""

    @property
    def arena(self) -> Arena | AttachedArena | SharedArena:
        """Arena with all arrays. `checkpoint`, `migrate` and other operations accept this object instead, unless the
        arena is attached."""
        return self._arena

    @property
    def free(self) -> int:
        """Memory for further arrays, bytes. An array requires a single free extent."""
        with self._lock:
            self._reclaim()
            return self._extents.free

    # -- creation

    def empty(self, name: str, shape: Shape, dtype: DTypeLike = "f8") -> Array:
        """Add an array with undefined contents, and return it. An array of this name is replaced.

        Raises UsageError for an invalid name, shape or type, or if there is no free extent of this length.
        """
        return self._add(name, _shape(shape), self._dtype(dtype), lambda _: None)

    def zeros(self, name: str, shape: Shape, dtype: DTypeLike = "f8") -> Array:
        """Add an array of zeros, and return it. See `empty`."""
        return self._add(name, _shape(shape), self._dtype(dtype), lambda array: array.fill(_zero(array)))

    def __setitem__(self, name: str, array: ArrayLike) -> None:
        """Add a copy of an array; an array of this name is replaced. The new contents are complete before the
        replacement. An assignment of an array to its own name has no effect."""
        import numpy

        given: Any = numpy.asarray(array)
        with self._lock:
            if name in self._entries and _same(given, self[name]):
                return
            self._add(name, given.shape, self._dtype(given.dtype), lambda new: numpy.copyto(new, given))

    def _add(self, name: str, shape: tuple[int, ...], dtype: Any, fill: Any) -> Array:
        if not 0 < len(values.text("name", name)) <= array_directory.MAX_NAME:
            raise UsageError(
                f"invalid `name` {name!r:.60}: expected a string of 1 to {array_directory.MAX_NAME} characters"
            )
        with self._lock:
            self._check_owner()
            info = self._allocate(shape, dtype, _nbytes(shape, dtype))
            try:
                new = self._array(info)
                fill(new)
                self._publish(self._entries | {name: info})
            except BaseException:
                self._abandon(info)
                raise
            return new

    # -- access

    def __getitem__(self, name: str) -> Array:
        """Return the array, a writable view of the memory."""
        with self._lock:
            self._refresh()
            return self._array(self._entries[name])

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            self._refresh()
            return iter(list(self._entries))

    def __len__(self) -> int:
        with self._lock:
            self._refresh()
            return len(self._entries)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            self._refresh()
            return name in self._entries

    def __delitem__(self, name: str) -> None:
        """Delete an array. Its memory is reused when no view of it exists; `trim` returns it to the system."""
        with self._lock:
            self._check_owner()
            known = self._known(name)
            self._publish({other: info for other, info in self._entries.items() if other != known})

    def resize(self, name: str, count: int) -> Array:
        """Change the length of the first axis, and return the array. New elements are zeros.

        The array moves if its extent is too short. Older views then refer to the old contents. Raises KeyError,
        UsageError.
        """
        values.count("count", count, 0, 1 << 46)
        with self._lock:
            self._check_owner()
            old = self._entries[self._known(name)]
            if not old.shape:
                raise UsageError(f"cannot resize array {name!r}: it has no axis")
            current, shape = self._array(old), (count, *old.shape[1:])
            needed = _nbytes(shape, current.dtype)
            if needed <= old.capacity:
                info = ArrayInfo(offset=old.offset, capacity=old.capacity, dtype=old.dtype, shape=shape)
                self._array(info)[len(current) :].fill(_zero(current))
                self._publish(self._entries | {name: info})
                return self._array(info)
            kept = current[: min(len(current), count)]
            info = self._allocate(shape, current.dtype, max(needed, min(old.capacity * 3 // 2, needed * 2)), needed)
            try:
                new = self._array(info)
                new[: len(kept)] = kept
                new[len(kept) :].fill(_zero(new))
                self._publish(self._entries | {name: info})
            except BaseException:
                self._abandon(info)
                raise
            return new

    def trim(self) -> int:
        """Discard the free pages of the arena. Return the number of bytes discarded. If any page is discarded during a
        checkpoint, the checkpoint fails with CheckpointError; repeat it."""
        with self._lock:
            self._check_owner()
            self._reclaim()
            total = 0
            for offset, length in self._extents:
                start = -(-offset // SMALL_PAGE) * SMALL_PAGE
                end = (offset + length) // SMALL_PAGE * SMALL_PAGE
                for first, stop in self._arena.data_ranges():
                    first, stop = max(first, start), min(stop, end)
                    if first < stop:
                        self._arena.discard(first, stop - first)
                        total += stop - first
            return total

    def close(self) -> None:
        """Release the name. The memory exists as long as this object or a view of an array exists."""
        if isinstance(self._arena, Arena):
            self._arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse pickles outside of multiprocessing and joblib, whose pickles contain handles. Raises UsageError."""
        return handles.reduce_or_refuse(self)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        """Return whether `other` is this object: arrays have no single truth value."""
        return self is other

    def __repr__(self) -> str:
        return f"<Arrays: {len(self)} in {self._arena!r}>"

    # -- called with the lock

    def _check_owner(self) -> None:
        if isinstance(self._arena, Arena):
            self._arena.check_here()
        if os.getpid() != self._owner:
            raise WorkloadError(
                f"cannot change the arrays of process {self._owner}: this process may only use existing arrays; add, "
                "delete or resize them in the process that created them"
            )

    def _refresh(self) -> None:
        """Read the directory again if the owner has changed it. Raises ImageError if it is damaged."""
        if os.getpid() == self._owner:
            return
        self._follow()
        if self._view.version() != self._version:
            self._version, self._entries, self._root_length = self._view.latest()
            self._exporters.clear()

    def _follow(self) -> None:
        """Map the memory by which the owner has extended the arena. Raises WorkloadError if the arena has been
        migrated."""
        if not isinstance(self._arena, SharedArena):
            self._arena.follow()
            if len(self._arena) > self._view.length:
                self._view = DirectoryView(memoryview(self._arena))

    def _known(self, name: str) -> str:
        if name not in self._entries:
            raise KeyError(name)
        return name

    def _dtype(self, dtype: Any) -> Any:
        import numpy

        try:
            found = numpy.dtype(dtype)
            if dtypes.from_text(dtypes.to_text(found)) != found:
                raise ValueError("it cannot be stored as a string")
        except (TypeError, ValueError) as error:
            raise UsageError(f"invalid `dtype` {dtype!r:.60}: {error}") from error
        return found

    def _array(self, info: ArrayInfo) -> Array:
        """Return the array with this description."""
        import numpy

        known = self._exporters.get(info.offset)
        exporter = None if known is None else known()
        if exporter is None or exporter.nbytes != info.capacity:
            memory = memoryview(self._arena)[info.offset : info.offset + info.capacity]
            exporter = numpy.frombuffer(memory, numpy.uint8)
            if len(self._exporters) > 2 * len(self._entries) + 64:
                self._exporters = {offset: one for offset, one in self._exporters.items() if one() is not None}
            self._exporters[info.offset] = weakref.ref(exporter)
            # The object must outlive the views: another object for the arena would reuse the memory of deleted arrays.
            weakref.finalize(exporter, _keep, self).atexit = False
        return numpy.ndarray(info.shape, dtypes.from_text(info.dtype), buffer=exporter)

    def _allocate(self, shape: tuple[int, ...], dtype: Any, wanted: int, needed: int | None = None) -> ArrayInfo:
        """Allocate an extent of `wanted` bytes; if there is none, of `needed` bytes, for which the arena is extended if
        possible. Raises UsageError."""
        self._reclaim()
        needed = wanted if needed is None else needed
        for nbytes, grows in ((wanted, False), (needed, False), (needed, True)):
            length, alignment = array_directory.array_extent(nbytes)
            if grows:
                self._grow(length)
            offset = self._extents.allocate(length, alignment)
            if offset is not None:
                return ArrayInfo(offset=offset, capacity=length, dtype=dtypes.to_text(dtype), shape=shape)
        raise UsageError(
            f"cannot add an array of {nbytes} bytes: {self._extents.free} of {len(self._arena)} bytes are free, in "
            f"{len(list(self._extents))} extents; delete arrays, or create `Arrays` with a larger size"
        )

    def _grow(self, length: int) -> None:
        """Extend the arena for an extent of `length` bytes, by at least half of its size, if its capacity permits."""
        arena, old = self._arena, len(self._arena)
        if isinstance(arena, Arena) and arena.capacity > old:
            arena.resize(min(arena.capacity, max(old * 3 // 2, old + length + SMALL_PAGE)))
            self._view = DirectoryView(memoryview(arena))
            self._extents.release(old, len(arena) - old)

    def _publish(self, entries: Entries) -> None:
        """Make `entries` the arrays of this object, then free the memory that only the old directory uses."""
        encoded = array_directory.encode(entries)
        length = array_directory.extent_length(len(encoded))
        self._reclaim()
        root = self._extents.allocate(length, array_directory.ALIGNMENT)
        if root is None:
            self._grow(length)
            root = self._extents.allocate(length, array_directory.ALIGNMENT)
        if root is None:
            raise UsageError(f"cannot change the directory: no extent of {length} bytes is free; delete arrays")
        version = self._view.write(root, encoded)
        self._view.publish(root)
        old, (old_root, _), old_length = self._entries, self._version, self._root_length
        self._entries, self._version, self._root_length = entries, version, length
        if old_root:
            self._extents.release(old_root, old_length)
        kept = {info.offset for info in entries.values()}
        for info in old.values():
            if info.offset not in kept:
                self._release(info)

    def _abandon(self, info: ArrayInfo) -> None:
        """Free the extent of an array that was not added. If an interrupt has occurred between the store of the root
        and the change of this object, the stored directory refers to the extent, which then stays allocated."""
        if self._view.root == self._version.root:
            self._release(info)

    def _release(self, info: ArrayInfo) -> None:
        """Free the extent of a deleted array, once no view refers to it."""
        known = self._exporters.pop(info.offset, None)
        exporter = None if known is None else known()
        if exporter is None:
            self._extents.release(info.offset, info.capacity)
        else:
            weakref.finalize(exporter, self._unused.append, (info.offset, info.capacity)).atexit = False

    def _reclaim(self) -> None:
        while self._unused:
            self._extents.release(*self._unused.popleft())


def _reduce(table: Arrays) -> Any:
    """Reduce arrays to the handle of their arena, for pickles of multiprocessing and loky."""
    arena = table.arena
    if isinstance(arena, SharedArena):
        return arena.__reduce_ex__(4)  # raises UsageError
    return _attach, (type(table), arena.handle())


def _attach(kind: type[Arrays], handle: Handle) -> Arrays:
    return kind.over(handles.attach_handle(handle))


def _keep(_: Arrays) -> None:
    pass


def _shape(shape: Shape) -> tuple[int, ...]:
    given = shape if isinstance(shape, tuple | list) else (shape,)
    return tuple(values.count("shape", one, 0, 1 << 46) for one in given)


def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    nbytes = math.prod(shape) * int(dtype.itemsize)
    span = math.prod(one for one in shape if one) * max(int(dtype.itemsize), 1)
    if nbytes > MAX_ARENA or span > array_directory.MAX_SPAN or len(shape) > 64:
        raise UsageError(f"invalid `shape` {shape}: expected at most {MAX_ARENA} bytes, and 64 axes")
    return nbytes


def _zero(array: Array) -> Any:
    """Return the zero of the type of an array."""
    import numpy

    return numpy.zeros((), array.dtype)[()]


def _same(given: Any, known: Any) -> bool:
    """Return whether `given` has the memory, type and layout of the array `known`."""
    described = ("data", "shape", "strides", "typestr", "descr")
    ours, theirs = known.__array_interface__, given.__array_interface__
    return all(ours.get(key) == theirs.get(key) for key in described)
