"""Arenas: memory of a Python program that can be migrated to another process or host while it is in use."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from types import TracebackType
from typing import Any, Literal, Self, Unpack

from pageferry import _engine, values
from pageferry.errors import RestoreError, UsageError, WorkloadError
from pageferry.host import proc, registry
from pageferry.host.blocking import interruptible, program_loop
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.pager import client, records
from pageferry.workloads import handles
from pageferry.workloads.access_page import AccessPage
from pageferry.workloads.addresses import reserving
from pageferry.workloads.arena.control import ArenaControl
from pageferry.workloads.arena.limits import MAX_ARENA
from pageferry.workloads.arena.name import NamedArena, load_stored
from pageferry.workloads.arena.options import ArenaArguments, ArenaOptions, arena_size
from pageferry.workloads.deferred_access import load_all
from pageferry.workloads.handle import Handle
from pageferry.workloads.lifecycle import Lifecycle, LocalWorkload, Status

LargePagesBy = Literal["tmpfs", "collapse", "none", "file"]


class Arena(handles.ArenaMapping):
    """Memory that can be migrated or saved while it is in use: a writable buffer backed by a shared file.

    An arena without a name is migrated by the program itself, with `pageferry.migrate`. `pageferry list` lists an arena
    with a name, and `pageferry migrate NAME host:port` in another process can migrate it at any time; therefore a named
    arena requires `on_pause`. The name is reserved on this host until `close()`, the end of the program, or the end of
    a migration. A named arena that is garbage-collected without `close()` releases its name and its memory, with a
    ResourceWarning.

    Parameters:
        size: size in bytes, or a text such as `1GiB`, rounded up to a multiple of 4096. Memory is allocated at the
            first access, even by a read.
        name: 1 to 64 letters, digits, dots, underscores and hyphens, unique on this host.
        large_pages: whether to back the memory with 2 MiB pages if that is permitted; `large_pages_by` shows how.
        state: data that is migrated in addition to the memory: a pair of callbacks (save() -> bytes, load(bytes)), or
            an object with `save_state` and `load_state`. Saved in the pause; loaded before the arena resumes.
        on_pause: callback that stops all writes to the arena, in all processes; no write may follow its return. If it
            raises, the migration fails, and the program continues. Alternatively a context manager (a lock), or a
            function that returns one: entered to pause, exited when the arena runs again, or after `on_moved`.
        on_resume: callback that lets the writers continue, at the source (after a failure) or at the destination.
        on_moved: callback for an arena that now runs at the destination; the previous callback was `on_pause`. Not
            called for a received arena that has never run in this program.
        direct_io: whether requests may read data into the arena without using the page tables: O_DIRECT, io_uring,
            RDMA. If so, `on_pause` must return only after such requests have completed, and is also called once in each
            round of a migration, followed at once by `on_resume`. False avoids these short pauses.
        loop: event loop of the program, for coroutine callbacks (default: the loop that creates the arena; without one,
            the loop that awaits `migrate` or `checkpoint`).
        capacity: maximum size, up to which `resize` can extend the arena, in bytes or as a string (default: the size).
            Addresses are reserved for it, but no memory. UsageError if it is smaller than the arena.

    Callbacks are called one at a time. Coroutine functions and asynchronous context managers run on `loop`; plain
    functions, and locks of `threading`, run in one thread that belongs to the arena. `migrate`, `checkpoint` and
    `receive` do not run on the loop that awaits them: a coroutine that blocks the loop (`with lock:`) delays no pause.
    A write to the arena between `on_pause` and `on_resume` may be lost. From `on_moved` on, the memory is read-only in
    every process that was traced, and keeps its last contents. New buffers are read-only, and methods raise
    WorkloadError. A write through an older view is not lost silently: it kills its process with SIGSEGV, after an error
    message. A writer that may run after a migration therefore checks `status` first. Without `on_pause`, the caller of
    `migrate` must ensure that there are no writes from the last round on.

    The arena is a buffer of `len(arena)` bytes: `memoryview(arena)`, `numpy.frombuffer(arena, ...)`, `readinto`. Other
    processes may map the memory too (children that inherit it, `mmap.mmap(arena.fileno(), ...)`): processes that have
    mapped it when a migration begins are traced as well. `fileno` describes the limits.

    Raises UsageError for an invalid size or name, NameInUse, WorkloadError if no addresses are available for it, and
    OSError if the memory cannot be allocated.

    Examples:
        >>> import numpy, pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> table = numpy.frombuffer(arena, numpy.float64)  # a view, no copy
        >>> table[:] = 1.5
        >>> print(len(arena), arena.status, memoryview(arena)[:8].cast("d")[0])
        1048576 running 1.5
    """

    large_pages_by: LargePagesBy
    """Method by which huge pages are allocated. `tmpfs`: by the kernel at the first access (requires root); `collapse`:
    by `collapse()`; `none`: not at all; `file`: by the file system of the file passed to `from_file`."""
    pager: _engine.Pager | None = None
    """Pager that loads deferred contents; None if all contents were present from the start."""
    _capacity: int
    _handed_out: bool = False
    _named: NamedArena | None = None
    received_state: bytes | None = None
    """State of a received arena that has no callback to load the state; None otherwise."""

    def __new__(
        cls,
        size: int | str,
        name: str | None = None,
        *,
        large_pages: bool = True,
        **options: Unpack[ArenaArguments],
    ) -> Self:
        chosen = _options(name, options)
        values.flag("large_pages", large_pages)
        length = _rounded(arena_size(size))
        file, large_pages_by = memory_file(length, large_pages, chosen.room(length))
        try:
            with reserving(name or "without a name", chosen.room(length)):
                self = super().__new__(cls, file, length, 0, chosen.room(length))
        finally:
            os.close(file)
        self.large_pages_by = large_pages_by
        self._begin(chosen, received=False)
        return self

    @classmethod
    def from_file(
        cls,
        file: int,
        size: int,
        name: str | None = None,
        *,
        paused: bool = True,
        private: bool = False,
        **options: Unpack[ArenaArguments],
    ) -> Self:
        """Create an arena over the first `size` bytes of an existing file, for an arena that is received or restored.

        `file`: descriptor of a shared memory file, open for reading and writing, such as `memory_file` creates; the
        descriptor is duplicated. `size`: multiple of 4096. `paused`: whether the arena waits for its state and its
        first `on_resume`. `private`: whether no other process uses the file; otherwise the memory counts as handed out
        (see `fileno`). `options` are those of `Arena`. Raises UsageError, NameInUse.
        """
        chosen = _options(name, options)
        values.flag("paused", paused)
        values.count("file", file, 0, (1 << 31) - 1)
        values.count("size", size, 1, MAX_ARENA)
        if size % SMALL_PAGE or size > os.fstat(file).st_size:
            raise UsageError(
                f"invalid size of {size} bytes for a file of {os.fstat(file).st_size} bytes: expected a multiple of "
                "4096, at most the size of the file"
            )
        with reserving(name or "without a name", chosen.room(size)):
            self = super().__new__(cls, file, size, 0, chosen.room(size))
        self.large_pages_by = "file"
        self._handed_out = not private
        self._begin(chosen, received=paused)
        return self

    def _begin(self, options: ArenaOptions, *, received: bool) -> None:
        self.access = AccessPage()
        self.control = ArenaControl(self, options, has_run=not received, loop=options.loop or program_loop())
        self.lifecycle = Lifecycle(self.control, received)
        self._capacity = options.room(self.length)
        handles.register(type(self))
        handles.remember(self, self.descriptor)
        if options.name is not None:
            self.register(options.name)

    @property
    def name(self) -> str | None:
        """Name under which the arena is registered on this host; None without one."""
        return None if self._folder is None else self._folder.name

    @property
    def status(self) -> Status:
        """`running`, `paused`, `committed` (paused, and possibly running at the destination) or `moved`."""
        return self.lifecycle.status

    @property
    def descriptor(self) -> int:
        """Descriptor of the memory for pageferry itself, which handles deferred contents; programs use `fileno()`."""
        return super().fileno()

    @property
    def handed_out(self) -> bool:
        """Whether the program has called `fileno`, or has created the arena over its own file."""
        return self._handed_out

    def fileno(self) -> int:
        """Return the descriptor of the memory, with which this or another process can map it again or use it as a file.

        A read through another mapping or the file would return zeros for deferred contents, and would not detect a
        discard. The first call therefore waits until all contents are in memory (lazy restore, cold store). From then
        on, the arena cannot be moved to a cold store; such a request fails with this reason. The same holds for an
        arena over a file passed to `from_file`, unless `private` is set.

        A process that maps the memory shared and writable is traced when a migration or a checkpoint begins. If a
        process has the memory open for writing without mapping it, the operation is refused. The following are not
        found: writes by system calls on the descriptor (`os.pwrite`), descriptors in flight between two processes or
        registered with io_uring, mappings that pageferry has not made and that exist only between two scans (at the
        beginning, before the pause, and at the end of a checkpoint), and processes outside this PID namespace. After
        this call, a user who cannot inspect all processes cannot migrate or save the arena. A descriptor obtained by
        other means (`/proc/PID/fd`, `pidfd_getfd`) is found, but does not count as a call of this method.

        Raises RestoreError if contents cannot be loaded, ImageError if they are damaged, WorkloadError after a
        migration.
        """
        self.check_here()
        if not self._handed_out:
            # Set the mark first: a store that is being filled checks it before each page that leaves memory.
            if self._folder is not None:
                records.mark_handed_out(self._folder)
                load_stored(self._folder)
            if self.pager is not None:
                self._load_all()
            self._handed_out = True
        return super().fileno()

    @property
    def capacity(self) -> int:
        """Maximum size, bytes."""
        return self._capacity

    def resize(self, size: int | str) -> None:
        """Extend the arena to `size` bytes, rounded up to a multiple of 4096. Its address stays the same, and the new
        memory reads as zeros.

        Existing buffers and arrays stay valid, and keep their length: create new ones for the new memory. All contents
        are loaded first (lazy restore, cold store). A checkpoint or migration that is in progress, and has not paused
        the arena yet, fails; repeat it. The method does not wait for `on_pause`, so the caller may hold its lock. An
        incremental checkpoint needs a parent of the same size.

        Raises UsageError if `size` is less than the current size or more than `capacity`, WorkloadError if the arena
        is not running, RestoreError, ImageError if contents cannot be loaded.
        """
        wanted = _rounded(arena_size(size))
        self.check_here()
        if not self.access.is_owner:
            raise WorkloadError(
                f"cannot resize {self.control.name}: this process has inherited it; resize it in the process that "
                "created it"
            )
        if not self.length <= wanted <= self._capacity:
            raise UsageError(
                f"invalid `size` {size}: expected {self.length} to {self._capacity} bytes; create the arena with a "
                "larger `capacity`"
            )
        if self._folder is not None:
            load_stored(self._folder)
        if self.pager is not None:
            self._load_all()
        self.lifecycle.resize(lambda: self._grow(wanted))

    def _load_all(self) -> None:
        pager = self.pager
        assert pager is not None
        interruptible(lambda: load_all(pager, self.length))

    def _grow(self, size: int) -> None:
        """Extend the file and its mapping, while the status is `running`. Raises WorkloadError."""
        if size <= self.length:  # another thread has extended the arena meanwhile
            return
        limits = os.fstatvfs(self.descriptor)
        if 0 < limits.f_blocks * limits.f_frsize < size:
            raise WorkloadError(
                f"cannot resize {self.control.name}: its file system has {limits.f_blocks * limits.f_frsize} bytes; "
                "create the arena with this size"
            )
        os.ftruncate(self.descriptor, size)
        _engine.Mapping.grow(self, size)

    def handle(self) -> Handle:
        """Return a handle by which other processes of this host attach the memory. The memory then counts as handed out
        (see `fileno`).

        Raises RestoreError, ImageError, WorkloadError.
        """
        descriptor = self.fileno()
        status = os.fstat(descriptor)
        return Handle(
            pid=os.getpid(),
            started=proc.start_time(os.getpid()) or 0,
            descriptor=descriptor,
            device=status.st_dev,
            inode=status.st_ino,
            length=self.length,
            capacity=self._capacity,
            page=self.access.file,
            name=self.name or "arena",
        )

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse pickles outside of multiprocessing and joblib, whose pickles contain handles. Raises UsageError."""
        return handles.reduce_or_refuse(self)

    def pagers(self) -> list[int]:
        """Return the process ids of the pageferry processes that load contents of the memory from a store."""
        if self._folder is None or not (self._folder.path / records.RECORD).exists():
            return []
        with contextlib.suppress(RestoreError):  # the pager was killed: the operations that need it report that
            status = client.status(self._folder)
            return [] if status is None else [status.pager]
        return []

    def workload(self) -> LocalWorkload:
        """Return this arena as a `Migratable`, to be migrated by this process."""
        return LocalWorkload(self.lifecycle, self)

    def register(self, name: str) -> None:
        """Register the arena under a name on this host, so that other processes can migrate it.

        Raises UsageError if there is no `on_pause`, the arena already has a name, or the name is invalid; NameInUse.
        """
        self.check_here()
        if self._folder is not None:
            raise UsageError(f"cannot register the arena: it already has the name {self._folder.name}")
        if self.control.on_pause is None:
            raise UsageError(f"cannot name arena {name} without `on_pause`: other processes may migrate it at any time")
        if (callback := self.control.needs_loop) is not None:
            raise UsageError(
                f"cannot name arena {name}: other processes can migrate it at any time, and {callback} is a coroutine "
                "function without an event loop; create the arena in a coroutine, or pass the event loop as `loop`"
            )
        if self.control.has_loop:
            self.check_lock()
        self._named = NamedArena(self, name)
        self.control.name = name
        self.control.moved = self._named.release

    def check_here(self) -> None:
        """Raise WorkloadError if the arena has been migrated, or is committed."""
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
        """Raise UsageError if `on_pause` acquires a lock that is never released after a migration, and for which
        coroutines may wait."""
        if self.control.keeps_lock:
            raise UsageError(
                "invalid `on_pause`: it acquires a lock that is not released when the arena has been migrated, and a "
                "coroutine that waits for the lock would block its event loop for ever; pass the lock itself as "
                "on_pause, or an on_moved that releases it"
            )

    def collapse(self) -> int:
        """Move the filled parts of the arena onto huge pages (MADV_COLLAPSE). Return the number of bytes backed by huge
        pages.

        Only whole 2 MiB units that contain data are collapsed; if no huge page is free, a unit keeps its base pages.
        Contents in a store are loaded first: a huge page must not be mapped while some of its contents are deferred.

        Raises RestoreError, ImageError if these contents cannot be loaded.
        """
        self.check_here()
        if self._folder is not None:
            load_stored(self._folder)
        space = _engine.Space()
        for start, end in self.data_ranges():
            for unit in range(-(-start // LARGE_PAGE), end // LARGE_PAGE):
                with contextlib.suppress(OSError):
                    space.collapse(self.address + unit * LARGE_PAGE, LARGE_PAGE)
        return sum(self.large_units()) * LARGE_PAGE

    def close(self) -> None:
        """Release the name, and refuse further requests from other processes. The memory is kept as long as this object
        or a view of it exists."""
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
        """Directory of the registered name; None without a name."""
        return None if self._named is None else self._named.folder


def _options(name: str | None, given: ArenaArguments) -> ArenaOptions:
    """Check the options of an arena. Raises UsageError, WrongType."""
    arguments: dict[str, Any] = {"name": name, **given}
    return values.options(ArenaOptions, arguments)


def _rounded(size: int) -> int:
    return -(-size // SMALL_PAGE) * SMALL_PAGE


_NO_MOUNT = (errno.EPERM, errno.EACCES, errno.ENOSYS)
"""Error numbers of mounting a tmpfs that indicate missing privileges or a sandbox."""


def memory_file(size: int, large_pages: bool = True, capacity: int = 0) -> tuple[int, LargePagesBy]:
    """Create a memory file, which may grow to `capacity` bytes. Return its descriptor, which the caller closes, and the
    method by which its huge pages are allocated.

    A tmpfs that allocates huge pages at the first access is used if this process may mount one (root), otherwise a
    memfd. Raises OSError.
    """
    large_pages_by: LargePagesBy = "none"
    if large_pages:
        try:
            file = _tmpfs_file(max(size, capacity))
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
        if large_pages_by != "tmpfs":  # files of a tmpfs cannot be sealed
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except BaseException:
        os.close(file)
        raise
    return file, large_pages_by


def _memfd() -> int:
    """Create a memfd and open it again: the kernel reports hole punching only through a reopened descriptor."""
    first = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        return os.open(f"/proc/self/fd/{first}", os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.close(first)


def _tmpfs_file(size: int) -> int:
    """Create an unnamed file on a private, detached tmpfs mount, which is freed with the file."""
    folder = _engine.large_tmpfs(size + LARGE_PAGE)
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
    finally:
        os.close(folder)
