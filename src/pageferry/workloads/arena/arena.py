"""Arenas: memory of a Python program that can move to another process or host while the program uses it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import weakref
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Literal, Protocol, Self

from pageferry import _engine, values
from pageferry.errors import RestoreError, UsageError, WorkloadError
from pageferry.host import registry
from pageferry.host.blocking import program_loop
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.pager import client, records
from pageferry.workloads import callbacks
from pageferry.workloads.arena.arguments import MAX_ARENA, arena_size, check_arena
from pageferry.workloads.arena.control import ArenaControl
from pageferry.workloads.arena.name import NamedArena, bring_back
from pageferry.workloads.callbacks import Callback, Plain
from pageferry.workloads.deferred_access import load_all
from pageferry.workloads.lifecycle import Lifecycle, LocalWorkload, Status


class Stateful(Protocol):
    """An object whose state moves with an arena."""

    def save_state(self) -> bytes | Awaitable[bytes]:
        """Called while the arena is paused at the source."""

    def load_state(self, state: bytes, /) -> object:
        """Called at the destination when all memory is there, before the resume callback."""


State = Stateful | tuple[Callable[[], bytes | Awaitable[bytes]], Callable[[bytes], object]]
LargePagesBy = Literal["tmpfs", "collapse", "none", "file"]


class Arena(_engine.Mapping):
    """Memory that can be migrated or saved while it is in use: a writable buffer over a shared file.

    ::

        arena = pageferry.Arena(1 << 30)
        table = numpy.frombuffer(arena, dtype=numpy.float64)      # a view, no copy
        table[:] = 1.0
        await pageferry.migrate(arena, "host:port")

    An arena without a name is migrated by the program itself, as above. One with a name is listed by `pageferry list`,
    and `pageferry migrate NAME host:port` in another process moves it at any time; that is why a named arena needs
    `on_pause`. The name is this host's until `close()`, the end of the program, or until the arena has moved away. A
    named arena that is collected without `close()` gives up its name and its memory, with a ResourceWarning.

    Parameters:
        size: bytes, rounded up to a multiple of 4096. Nothing is allocated before it is touched; reading counts.
        name: 1 to 64 letters, digits, dots, underscores and hyphens, unique on this host.
        large_pages: back the memory with 2 MiB pages where that is allowed; `large_pages_by` says how.
        state: what has to move besides the memory: a pair of callbacks (save() -> bytes, load(bytes)), or an object
            with `save_state` and `load_state`. Saved while paused, loaded at the destination before it resumes.
        on_pause: stops everything that writes to the arena, in all processes; no write may follow its return. An
            exception ends the migration, and the program continues. Or a context manager (a lock), or a function
            that returns one: entered to pause, left when the arena runs again and after `on_moved`.
        on_resume: lets the writers continue, here (the migration failed) or at the destination.
        on_moved: called when the arena runs elsewhere; `on_pause` was the last callback before. Not called for a
            received arena that has never run here.
        direct_io: whether the program may have data read into the arena past the page tables: O_DIRECT, io_uring,
            RDMA. If so, `on_pause` must return after such requests have ended, and is also called, with `on_resume`
            right after it, once in each round of a migration. False saves these short pauses.
        loop: event loop of the program, for coroutine callbacks (default: the loop that makes the arena; without one,
            the loop that awaits `migrate` or `checkpoint`).

    Callbacks are called one at a time. Coroutine functions and asynchronous context managers run on `loop`; plain
    functions, and locks of `threading`, run in one thread that belongs to the arena. `migrate`, `checkpoint` and
    `receive` work beside the loop that awaits them, so a coroutine that blocks it (`with lock:`) delays no pause.
    Between `on_pause` and `on_resume` a write to the arena is lost. From `on_moved` on the memory is read-only in every
    process that was traced, and keeps its last contents. New buffers are read-only, and methods raise WorkloadError. A
    write through an older view ends its process with SIGSEGV, after a message, instead of being lost: a writer that
    runs after a move checks `status` first. Without `on_pause` the caller of `migrate` promises
    that nothing writes from the last round on.

    The arena is a buffer of `len(arena)` bytes: `memoryview(arena)`, `numpy.frombuffer(arena, ...)`, `readinto`. Other
    processes may map it too (children that inherit it, `mmap.mmap(arena.fileno(), ...)`): those that have it mapped
    when a migration begins are traced as well. `fileno` names the limits, and what it means for deferred contents.

    Raises UsageError for a size or name that cannot be, NameInUse, and OSError when memory cannot be had.
    """

    large_pages_by: LargePagesBy
    """How large pages come about: `tmpfs`, at first touch (as root); `collapse`, by `collapse()`; `none`, not wanted;
    `file`, as in the file that was given."""
    pager: _engine.Pager | None = None
    """What brings its contents, where they were not there from the start."""
    _handed_out: bool = False
    _named: NamedArena | None = None
    received_state: bytes | None = None
    """State that came with a received arena and had no callback to go to."""

    def __new__(
        cls,
        size: int,
        name: str | None = None,
        *,
        large_pages: bool = True,
        state: State | None = None,
        on_pause: Callback | None = None,
        on_resume: Plain | None = None,
        on_moved: Plain | None = None,
        direct_io: bool = True,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Self:
        check_arena(name, state, on_pause, on_resume, on_moved, large_pages=large_pages)
        size = _rounded(arena_size(size))
        file, large_pages_by = memory_file(size, large_pages)
        try:
            self = super().__new__(cls, file, size)
        finally:
            os.close(file)
        self.large_pages_by = large_pages_by
        self._begin(name, state, on_pause, on_resume, on_moved, loop, received=False)
        self.control.does_direct_io = direct_io
        return self

    @classmethod
    def from_file(
        cls,
        file: int,
        size: int,
        name: str | None = None,
        *,
        state: State | None = None,
        on_pause: Callback | None = None,
        on_resume: Plain | None = None,
        on_moved: Plain | None = None,
        direct_io: bool = True,
        loop: asyncio.AbstractEventLoop | None = None,
        paused: bool = True,
        private: bool = False,
    ) -> Self:
        """An arena over the first `size` bytes of a file that is there already: one that is, or will be, received.

        `file` is a descriptor of a shared memory file (`memory_file` makes one), open for reading and writing; it is
        duplicated. A `paused` arena waits for its state, and for its first `on_resume`. `size` is a multiple of 4096.
        `private`: the file is used by this arena alone; otherwise it counts as handed out (see `fileno`).
        """
        check_arena(name, state, on_pause, on_resume, on_moved, paused=paused)
        values.count("file", file, 0, (1 << 31) - 1)
        values.count("size", size, 1, MAX_ARENA)
        if size % SMALL_PAGE or size > os.fstat(file).st_size:
            raise UsageError(
                f"invalid size of {size} bytes of a file of {os.fstat(file).st_size} bytes: expected a multiple of "
                "4096, at most the size of the file"
            )
        self = super().__new__(cls, file, size)
        self.large_pages_by = "file"
        self._handed_out = not private
        self._begin(name, state, on_pause, on_resume, on_moved, loop, received=paused)
        self.control.does_direct_io = direct_io
        return self

    def _begin(
        self,
        name: str | None,
        state: State | None,
        on_pause: Callback | None,
        on_resume: Plain | None,
        on_moved: Plain | None,
        loop: asyncio.AbstractEventLoop | None,
        *,
        received: bool,
    ) -> None:
        self.control = ArenaControl(self, on_pause, on_resume, on_moved, not received, loop or program_loop())
        if state is not None:
            save, load = state if isinstance(state, tuple) else (state.save_state, state.load_state)
            for callback in (save, load):
                callbacks.check("a callback of state", callback)
            self.control.save, self.control.load = save, load
        self.lifecycle = Lifecycle(self.control, received)
        if name is not None:
            self.register(name)

    @property
    def name(self) -> str | None:
        """The name it is registered under on this host; None without one."""
        return None if self._folder is None else self._folder.name

    @property
    def status(self) -> Status:
        """`running`, `paused`, `committed` (paused, and maybe running elsewhere) or `moved`."""
        return self.lifecycle.status

    @property
    def descriptor(self) -> int:
        """Descriptor of its memory, for the work of pageferry, which knows what is deferred; others take `fileno()`."""
        return super().fileno()

    @property
    def handed_out(self) -> bool:
        """Whether the program has called `fileno`, or has made the arena over a file of its own."""
        return self._handed_out

    def fileno(self) -> int:
        """Descriptor of the memory: to map it at another place or in another process, to read and write it as a file.

        Through another mapping, or the file, deferred contents would read as zeros, and no discard would be noticed. So
        the first call waits until all contents are in memory (lazy restore, cold store), and from then on nothing of
        the arena is sent to a cold store: that is refused by name. The same holds for the file given to `from_file`.

        A process that maps the memory shared and writable is traced when a migration or a checkpoint begins. One that
        has it open for writing without mapping it is refused. Not found: writes by system calls on the descriptor
        (`os.pwrite`), descriptors in flight between two processes or registered with io_uring, mappings that exist only
        between two scans (at the beginning and before the pause), and processes outside this PID namespace. After this
        call, a user who may not look into all processes cannot migrate or save the arena. A descriptor that a process
        of the same user takes by other means (`/proc/PID/fd`, `pidfd_getfd`) is found, but does not count as this call.

        Raises RestoreError when the contents cannot be loaded, ImageError when their image is damaged, WorkloadError
        when the arena has moved.
        """
        self.check_here()
        if not self._handed_out:
            # The mark comes first: a store that is being filled looks at it before each page that leaves memory.
            if self._folder is not None:
                records.mark_handed_out(self._folder)
                bring_back(self._folder)
            if self.pager is not None:
                load_all(self.pager, self.length)
            self._handed_out = True
        return super().fileno()

    def pagers(self) -> list[int]:
        """Processes of pageferry that bring contents of the memory from a store."""
        if self._folder is None or not (self._folder.path / records.RECORD).exists():
            return []
        with contextlib.suppress(RestoreError):  # it has been killed: what needs it reports that
            status = client.status(self._folder)
            return [] if status is None else [status.pager]
        return []

    def workload(self) -> LocalWorkload:
        """This arena as a `Workload`, to be migrated by this process."""
        return LocalWorkload(self.lifecycle, self)

    def register(self, name: str) -> None:
        """Give the arena a name on this host, under which other processes may migrate it.

        Raises UsageError without `on_pause`, when it has a name already or the name is none; NameInUse.
        """
        self.check_here()
        if self._folder is not None:
            raise UsageError(f"cannot register the arena: it is named {self._folder.name} already")
        if self.control.on_pause is None:
            raise UsageError(f"arena {name} needs `on_pause`: other processes may migrate it at any time")
        if (callback := self.control.needs_loop) is not None:
            raise UsageError(
                f"arena {name}: {callback} is a coroutine function without an event loop, and other processes can "
                "migrate the arena at any time; create the arena in a coroutine, or pass the event loop as `loop`"
            )
        if self.control.has_loop:
            self.check_lock()
        self._named = NamedArena(self, name)
        _all_named.add(self)
        self.control.name = name
        self.control.moved = self._named.release

    def check_here(self) -> None:
        """Raise WorkloadError where the arena has moved, or has been given away."""
        match self.status:
            case Status.MOVED:
                raise WorkloadError(
                    f"cannot use {self.control.name}: it has been migrated to another process or host; use it there"
                )
            case Status.COMMITTED:
                raise WorkloadError(
                    f"cannot use {self.control.name}: it was committed by an earlier migration whose outcome is "
                    "unknown; pass the error of that migration to pageferry.recover"
                )

    def check_lock(self) -> None:
        """Raise UsageError where coroutines of a loop may wait for a lock that is held for ever after a move."""
        if self.control.keeps_lock:
            raise UsageError(
                "on_pause acquires a lock that is not released when the arena has been migrated: a coroutine "
                "that waits for it would block its event loop for ever; pass the lock itself as on_pause, or an "
                "on_moved that releases it"
            )

    def collapse(self) -> int:
        """Put what has been filled onto large pages, and say how many bytes now are (MADV_COLLAPSE).

        Only whole 2 MiB units that hold data are tried; without memory for a large page a unit stays as it is. What is
        in a store comes back first: a large page that is not all there must not be mapped.

        Raises RestoreError, ImageError when that cannot be.
        """
        self.check_here()
        if self._folder is not None:
            bring_back(self._folder)
        space = _engine.Space()
        for start, end in self.data_ranges():
            for unit in range(-(-start // LARGE_PAGE), end // LARGE_PAGE):
                with contextlib.suppress(OSError):
                    space.collapse(self.address + unit * LARGE_PAGE, LARGE_PAGE)
        return sum(self.large_units()) * LARGE_PAGE

    def close(self) -> None:
        """Give up the name and refuse further control. The memory stays as long as the object or a view of it does."""
        if self._named is not None:
            self._named.close()

    def __del__(self) -> None:
        if self._named is not None:
            self._named.abandon(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = f" {self.name}" if self.name else ""
        return f"<Arena{name}: {self.length >> 20} MiB, {self.status}>"

    @property
    def _folder(self) -> registry.Folder | None:
        """Its folder, as long as it has a name."""
        return None if self._named is None else self._named.folder


def _rounded(size: int) -> int:
    return -(-size // SMALL_PAGE) * SMALL_PAGE


_NO_MOUNT = (errno.EPERM, errno.EACCES, errno.ENOSYS)
"""Errors of users, and of sandboxes, that may mount no tmpfs."""


def memory_file(size: int, large_pages: bool = True) -> tuple[int, LargePagesBy]:
    """A fresh file of that size in memory (a descriptor, the caller's to close), and how it comes by large pages.

    A tmpfs that gives large pages at first touch needs root; otherwise it is a memfd.
    """
    large_pages_by: LargePagesBy = "none"
    if large_pages:
        try:
            file = _tmpfs_file(size)
            large_pages_by = "tmpfs"
        except OSError as refused:
            if refused.errno not in _NO_MOUNT:
                raise
            file = _memfd()
            large_pages_by = "collapse"
    else:
        file = _memfd()
    try:
        os.ftruncate(file, size)
        if large_pages_by != "tmpfs":  # whose files cannot be sealed
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except BaseException:
        os.close(file)
        raise
    return file, large_pages_by


def _memfd() -> int:
    """A memfd that was opened again: the kernel reports holes that are punched by such a descriptor only."""
    first = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        return os.open(f"/proc/self/fd/{first}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(first)


def _tmpfs_file(size: int) -> int:
    """A file without a name on a tmpfs of its own that is mounted nowhere and goes with the file."""
    folder = _engine.large_tmpfs(size + LARGE_PAGE)
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
    finally:
        os.close(folder)


_all_named: weakref.WeakSet[Arena] = weakref.WeakSet()


def _before_fork() -> None:
    """A child has no pager: what is in a store comes back first (or is not mapped in the child)."""
    for arena in list(_all_named):
        if arena._named is not None:
            arena._named.bring_back()


os.register_at_fork(before=_before_fork)
