"""Arenas: memory of a Python program that can move to another process or host while the program uses it."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Protocol, Self

from pageferry import _engine, values
from pageferry.errors import UsageError
from pageferry.host import registry
from pageferry.workloads import deferred
from pageferry.workloads.arena_control import ArenaControl, Callback
from pageferry.workloads.arguments import MAX_ARENA, arena_size, check_arena
from pageferry.workloads.base import LARGE_PAGE, SMALL_PAGE
from pageferry.workloads.control.server import ControlServer
from pageferry.workloads.following import note_forks
from pageferry.workloads.lifecycle import Lifecycle, LocalWorkload, Status
from pageferry.workloads.settling import bring_all


class Stateful(Protocol):
    """An object whose state moves with an arena."""

    def save_state(self) -> bytes:
        """Called while the arena is paused at the source."""

    def load_state(self, state: bytes, /) -> object:
        """Called at the destination when all memory is there, before the resume callback."""


State = Stateful | tuple[Callable[[], bytes], Callable[[bytes], object]]
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
    `on_pause`. The name is this host's until `close()`, the end of the program, or until the arena has moved away.

    Parameters:
        size: bytes, rounded up to a multiple of 4096. Nothing is allocated before it is touched; reading counts.
        name: 1 to 64 letters, digits, dots, underscores and hyphens, unique on this host.
        large_pages: back the memory with 2 MiB pages where that is allowed; `large_pages_by` says how.
        state: what has to move besides the memory: a pair of callbacks (save() -> bytes, load(bytes)), or an object
            with `save_state` and `load_state`. Saved while paused, loaded at the destination before it resumes.
        on_pause: called to stop everything that writes to the arena; when it returns, nothing may write any more. An
            exception ends the migration, and the program goes on.
        on_resume: called to let it go on, here (the migration failed) or at the destination (it did not).
        on_moved: called when the arena runs elsewhere for good; `on_pause` was the last callback before. Not called for
            a received arena that never came to run here.
        direct_io: whether the program may have data read into the arena past the page tables: O_DIRECT, io_uring,
            RDMA. If so, `on_pause` must return after such requests have ended, and is also called, with `on_resume`
            right after it, once in each round of a migration. False saves these short pauses.

    Callbacks are called in threads of pageferry's, one at a time. Between `on_pause` and `on_resume` a write to the
    arena is a write that the destination never sees. Without `on_pause` the caller of `migrate` promises that nothing
    writes from the last round on.

    The arena is a buffer of `len(arena)` bytes: `memoryview(arena)`, `numpy.frombuffer(arena, ...)`, `readinto`. Other
    processes may map it too (`multiprocessing` children that inherit it, `mmap.mmap(arena.fileno(), ...)`): those that
    descend from this one and have it mapped when a migration begins are traced as well. See `fileno` for mappings of
    memory whose contents are deferred.

    Raises UsageError for a size or name that cannot be, NameInUse, and OSError when memory cannot be had.
    """

    large_pages_by: LargePagesBy
    """How large pages come about: `tmpfs`, at first touch (as root); `collapse`, by `collapse()`; `none`, not wanted;
    `file`, as in the file that was given."""
    pager: _engine.Pager | None = None
    """What brings its contents, where they were not there from the start."""
    _handed_out: bool = False
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
        on_resume: Callback | None = None,
        on_moved: Callback | None = None,
        direct_io: bool = True,
    ) -> Self:
        check_arena(name, state, on_pause, on_resume, on_moved, large_pages=large_pages)
        size = _rounded(arena_size(size))
        file, large_pages_by = memory_file(size, large_pages)
        try:
            self = super().__new__(cls, file, size)
        finally:
            os.close(file)
        self.large_pages_by = large_pages_by
        self._begin(name, state, on_pause, on_resume, on_moved, received=False)
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
        on_resume: Callback | None = None,
        on_moved: Callback | None = None,
        direct_io: bool = True,
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
            raise UsageError(f"{size} bytes of a file of {os.fstat(file).st_size}: not a multiple of 4096 within it")
        self = super().__new__(cls, file, size)
        self.large_pages_by = "file"
        self._handed_out = not private
        self._begin(name, state, on_pause, on_resume, on_moved, received=paused)
        self.control.does_direct_io = direct_io
        return self

    def _begin(
        self,
        name: str | None,
        state: State | None,
        on_pause: Callback | None,
        on_resume: Callback | None,
        on_moved: Callback | None,
        *,
        received: bool,
    ) -> None:
        self.control = ArenaControl(self, on_pause, on_resume, on_moved, has_run=not received)
        if state is not None:
            save, load = state if isinstance(state, tuple) else (state.save_state, state.load_state)
            self.control.save, self.control.load = save, load
        self.lifecycle = Lifecycle(self.control, received)
        self._server: ControlServer | None = None
        self._folder: registry.Folder | None = None
        self._owner = os.getpid()
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

    def fileno(self) -> int:
        """Descriptor of its memory: to map it at another place or in another process, to read and write it as a file.

        Through another mapping, or the file, deferred contents would read as zeros, and no discard would be noticed. So
        the first call waits until all contents are in memory (lazy restore, cold store), and from then on nothing of
        the arena is sent to a cold store: that is refused by name. The same holds for the file given to `from_file`.
        Descriptors that are taken by other ways (`/proc/PID/fd`, `pidfd_getfd`) are not known to pageferry.

        Raises RestoreError when the contents cannot be loaded, ImageError when their image is damaged.
        """
        if not self._handed_out:
            # The mark comes first: a store that is being filled looks at it before each page that leaves memory.
            if self._folder is not None:
                deferred.mark_handed_out(self._folder)
                _bring_back(self._folder)
            if self.pager is not None:
                bring_all(self.pager, self.length)
            self._handed_out = True
        return super().fileno()

    def workload(self) -> LocalWorkload:
        """This arena as a `Workload`, to be migrated by this process."""
        return LocalWorkload(self.lifecycle)

    def register(self, name: str) -> None:
        """Give the arena a name on this host, under which other processes may migrate it.

        Raises UsageError without `on_pause`, when it has a name already or the name is none; NameInUse.
        """
        if self._folder is not None:
            raise UsageError(f"the arena is named {self._folder.name} already")
        if self.control.on_pause is None:
            raise UsageError(f"arena {name} needs `on_pause`: other processes may migrate it at any time")
        folder = registry.Registry().claim(name)
        try:
            if self._handed_out:
                deferred.mark_handed_out(folder)
            path = folder.socket_path("control.sock")
            self._server = ControlServer(self.lifecycle, path)
            folder.publish(registry.ArenaEntry(**registry.identify(os.getpid()), control_socket=path))
        except BaseException:
            if self._server is not None:
                self._server.close()
            folder.release()
            raise
        self._folder = folder
        note_forks(folder)
        _named.add(self)
        self.control.name = name
        self.control.moved = self._release
        atexit.register(self.close)

    def collapse(self) -> int:
        """Put what has been filled onto large pages, and say how many bytes now are (MADV_COLLAPSE).

        Only whole 2 MiB units that hold data are tried; without memory for a large page a unit stays as it is. What is
        in a store comes back first: a large page that is not all there must not be mapped.

        Raises RestoreError, ImageError when that cannot be.
        """
        if self._folder is not None:
            _bring_back(self._folder)
        space = _engine.Space()
        for start, end in self.data_ranges():
            for unit in range(-(-start // LARGE_PAGE), end // LARGE_PAGE):
                with contextlib.suppress(OSError):
                    space.collapse(self.address + unit * LARGE_PAGE, LARGE_PAGE)
        return sum(self.large_units()) * LARGE_PAGE

    def close(self) -> None:
        """Give up the name and refuse further control. The memory stays as long as the object or a view of it does."""
        self._release()
        if self._server is not None:
            self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = f" {self.name}" if self.name else ""
        return f"<Arena{name}: {self.length >> 20} MiB, {self.status}>"

    def _release(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None and os.getpid() == self._owner:  # a forked child has no say in it
            _bring_back(folder)
            atexit.unregister(self.close)
            assert self._server is not None
            self._server.stop_listening()
            folder.release()


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


_named: weakref.WeakSet[Arena] = weakref.WeakSet()


def _bring_back(folder: registry.Folder) -> None:
    """Have in memory what others have sent to a store, which is in the folder, and needs it for its pager.

    Raises RestoreError when the pager has died, ImageError when the store cannot be read.
    """
    if (folder.path / deferred.RECORD).exists():
        deferred.settle(folder)
        while (folder.path / deferred.RECORD).exists():  # until the pager has let go of it
            time.sleep(0.005)


def _before_fork() -> None:
    """A child has no pager: what is in a store comes back first (or is not mapped in the child)."""
    for arena in list(_named):
        if arena._folder is not None and os.getpid() == arena._owner:
            _bring_back(arena._folder)


os.register_at_fork(before=_before_fork)
