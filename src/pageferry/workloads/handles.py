"""Handles: use of arenas in other processes of this host, by pickle (multiprocessing, joblib) or by name.

A handle names the file of an arena by a descriptor of its owner, and the process that unpickles the handle maps the
same memory. The mapping is shared and writable, so a migration or a checkpoint finds the process in /proc and traces
it, like every other process that maps the arena (`memory.mappers`). An operation that began before the memory was
mapped fails, because its traces do not cover the process (`access_page`). Creating a handle counts as handing out the
descriptor (`Arena.fileno`).

A handle is valid while its owner runs. It is therefore created only for a pickle that another process of this host
reads at once: by multiprocessing (spawn, forkserver, pools, queues) and by loky (joblib). Other pickles are refused.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, Protocol, Self

import msgspec

from pageferry import _engine
from pageferry.errors import UsageError, WorkloadDied, WorkloadError
from pageferry.host import forks, proc
from pageferry.workloads.access_page import AccessPage
from pageferry.workloads.addresses import reserving
from pageferry.workloads.handle import Handle, OpenFile, SharedHandle

_PICKLERS = ("multiprocessing.reduction", "loky.backend.reduction", "joblib.externals.loky.backend.reduction")
"""Modules that create the pickles of multiprocessing and loky, and in which reducers are registered. Only the program
imports them: without them, it passes no arena to another process."""


class Handed(Protocol):
    """Arena of this process, or one that this process has attached."""

    @property
    def address(self) -> int:
        """Address of the memory in this process."""

    @property
    def length(self) -> int:
        """Length of the memory, bytes."""

    def handle(self) -> Handle | SharedHandle:
        """Return a handle of the memory, which counts as handed out."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


def _withheld(self: object) -> NoReturn:
    raise AttributeError(f"{type(self).__name__} has no such method for programs; an arena grows by `resize`")


class ProgramMapping(_engine.Mapping):
    """Mapping that a program receives. Methods that would change the mapped addresses or the contents without the
    lifecycle of the arena are withheld: pageferry calls those of `_engine.Mapping`."""

    grow = replace = permit = keep = copy_in = property(_withheld)


class ArenaMapping(ProgramMapping):
    """Mapping of the memory of an arena, in its owner or in another process."""

    access: AccessPage

    @property
    def name(self) -> str | None:
        """Name of the arena."""
        raise NotImplementedError

    def follow(self) -> None:
        """Map the memory by which the owner, another process, has extended the arena, unless it is mapped. Raises
        WorkloadError, WorkloadDied (see `AccessPage.map`)."""
        old, size = self.length, os.fstat(_engine.Mapping.fileno(self)).st_size
        if size > old:
            self.access.map(self.name or "arena", old, lambda: self._extended(size))

    def _extended(self, size: int) -> Self:
        with reserving(self.name or "arena", size):
            _engine.Mapping.grow(self, size)
        return self


class AttachedArena(ArenaMapping):
    """Arena of another process, attached by a handle or a name: a writable buffer of the same memory.

    The owner saves and migrates the arena, and traces the writes of this process. When the arena has been migrated, the
    memory is read-only in this process too.
    """

    owner: int
    """Process id of the owner."""
    _handle: Handle

    @classmethod
    def open(cls, handle: Handle) -> Self:
        """Map the memory of a handle. Raises WorkloadDied if the owner has exited, WorkloadError if the memory cannot
        be opened."""
        page = _open(handle, handle.page)
        try:
            access = AccessPage.over(page)
        finally:
            os.close(page)
        file = _open(handle, OpenFile(descriptor=handle.descriptor, device=handle.device, inode=handle.inode))
        try:
            self = access.map(handle.name, 0, lambda: cls(file, handle.length, 0, handle.capacity))
        finally:
            os.close(file)
        self.owner, self.access, self._handle = handle.pid, access, handle
        return self

    @property
    def name(self) -> str:
        """Name of the arena, for error messages."""
        return self._handle.name

    def handle(self) -> Handle:
        """Return a handle of the memory that this process has attached."""
        return msgspec.structs.replace(self._handle, length=self.length)

    def __reduce_ex__(self, protocol: object) -> Any:
        return reduce_or_refuse(self)

    def __repr__(self) -> str:
        return f"<AttachedArena {self.name}: {self.length >> 20} MiB of process {self.owner}>"

    def __new__(cls, file: int, length: int, offset: int = 0, capacity: int = 0) -> Self:
        """Map the memory, with addresses for its growth if these are available. Raises WorkloadError, OSError."""
        try:
            return super().__new__(cls, file, length, offset, capacity)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        with reserving("of another process", length):
            return super().__new__(cls, file, length, offset)


_known: weakref.WeakValueDictionary[tuple[int, int], Handed] = weakref.WeakValueDictionary()
"""Arenas of this process, and those that it has attached, by device and inode. A second mapping of an arena by its own
process would not be traced."""
_lock = forks.Lock()


def remember(arena: Handed, file: int) -> None:
    """Record an arena of this process, whose memory is the open file `file`."""
    status = os.fstat(file)
    _known[status.st_dev, status.st_ino] = arena


def containing(address: int, length: int) -> Handed | None:
    """Return the arena, created or attached by this process, that contains a range of memory; None if there is none."""
    for arena in list(_known.values()):
        if arena.address <= address and address + length <= arena.address + arena.length:
            return arena
    return None


def attach_handle(handle: Handle) -> Any:
    """Return the arena of a handle: the arena itself in its own process, otherwise an `AttachedArena`. Raises
    WorkloadDied, WorkloadError."""
    with _lock:
        found = _known.get(handle.file)
        if found is None:
            register(AttachedArena)
            found = _known[handle.file] = AttachedArena.open(handle)
        elif handle.length > found.length and isinstance(found, ArenaMapping):
            found.follow()
        return found


def reduce(arena: Handed) -> tuple[Callable[[Handle], Any], tuple[Handle | SharedHandle]]:
    """Reduce an arena to its handle, for pickles of multiprocessing and loky."""
    return attach_handle, (arena.handle(),)


def register(kind: type, reducer: Callable[[Any], Any] = reduce) -> None:
    """Register the reducer of a class for pickles of multiprocessing and loky."""
    _reducers[kind] = reducer
    _register_all()


_reducers: dict[type, Callable[[Any], Any]] = {}
_registered: set[tuple[str, type]] = set()
"""Modules of `_PICKLERS`, and the classes whose reducers are registered there."""


def _register_all() -> None:
    """Register all reducers in those modules that the program has imported."""
    for name in _PICKLERS:
        module: Any = sys.modules.get(name)
        for kind, reducer in _reducers.items():
            if module is not None and (name, kind) not in _registered:
                module.register(kind, reducer)
                _registered.add((name, kind))


def reduce_or_refuse(obj: Any) -> Any:
    """Refuse a pickle that is neither of multiprocessing nor of loky. If the program has imported one of their modules
    since the last registration, this may be the first pickle of that module; in that case, reduce the object to its
    handle. Raises UsageError."""
    _register_all()
    if not _is_called_by_pickler():
        raise UsageError(
            f"cannot pickle an object of type {type(obj).__name__}: a handle is valid only on this host, while this "
            "process runs; pass it to a process of multiprocessing, ProcessPoolExecutor or joblib, use "
            "`pageferry.attach(name)`, or save it with `pageferry.checkpoint` or `pageferry.dump`"
        )
    return _reducers[type(obj)](obj)


def _is_called_by_pickler() -> bool:
    """Return whether a function of a module of `_PICKLERS` is among the callers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in _PICKLERS:
            return True
        frame = frame.f_back
    return False


def _open(handle: Handle, file: OpenFile) -> int:
    """Open a file of the owner of a handle. Raises WorkloadDied, WorkloadError."""
    path = f"/proc/{handle.pid}/fd/{file.descriptor}"
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            status = os.fstat(found)
            if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != (file.device, file.inode):
                raise FileNotFoundError(f"its descriptor {file.descriptor} refers to another file")
            return os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(found)
    except OSError as error:
        if not proc.is_alive(handle.pid, handle.started):
            raise WorkloadDied(
                f"cannot attach arena {handle.name}: its owner, process {handle.pid}, has exited; attach it while the "
                "owner runs"
            ) from error
        raise WorkloadError(
            f"cannot attach arena {handle.name} of process {handle.pid}: {error.strerror or error}; run as the user of "
            "that process, on the same host"
        ) from error
