"""Arenas restored from images: usable at once, with their memory loaded on demand (S10)."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, Unpack, overload

from pageferry import values
from pageferry._engine import Advice, MappedSegment, Mapping, Pager, Space, TargetRegion
from pageferry.checkpoints.eager import load
from pageferry.checkpoints.events import EagerEvent
from pageferry.checkpoints.image_source import local_image
from pageferry.checkpoints.options import Memory
from pageferry.checkpoints.restore_options import RestoreArguments, RestoredArenaOptions
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.host import forks
from pageferry.host.blocking import in_own_thread, interruptible
from pageferry.images import targets
from pageferry.images.image import ImageFile
from pageferry.images.working_set import WorkingSet
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import page_faults, records
from pageferry.pager.fill_order import FillOrder, fill_order
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.server import PagerServer
from pageferry.stores.lazy_image import open_image_file
from pageferry.workloads.arena.arena import Arena, memory_file
from pageferry.workloads.deferred_access import load_all, load_pages

if TYPE_CHECKING:
    from pageferry.workloads.arena.shared import SharedArena

log = getLogger(__name__)


class RestoredArena(Arena):
    """Arena whose contents are loaded from an image, on demand and in the background.

    An access to a page that cannot be read, because the image is damaged or missing, ends the program with SIGBUS and a
    message; it never reads zeros. `ensure` and `load` raise ImageError instead.
    """

    image: ImageFile
    pager: Pager
    _flags: int
    """Descriptor of the deferred bitmap, for other processes that read it."""

    @classmethod
    def from_image(cls, image: ImageFile, options: RestoredArenaOptions, listener: Listener = ignore) -> Self:
        """Create the arena from an open image (see `restore`)."""
        size = _size(image)
        file, large_pages_by = memory_file(size, capacity=options.room(size))
        try:
            self = cls.from_file(file, size, private=True, **options.arguments())
            self.large_pages_by = large_pages_by
            self._load_from(image, options, listener)
        finally:
            os.close(file)
        self.lifecycle.load_state(self, image.state())
        if options.name is not None:
            self.register(options.name)
        self.lifecycle.resume(self)
        return self

    def _load_from(self, image: ImageFile, options: RestoredArenaOptions, listener: Listener) -> None:
        """Start the pager, or load all contents if page faults of this process cannot be handled."""
        self.image = image
        working_set = WorkingSet(image)
        self._flags = records.create_flags(None, Pager.flags_length(image.pages))
        weakref.finalize(self, os.close, self._flags)
        try:
            self.pager = _pager(image, self, working_set.windows, options)
        except CannotHandleFaults as refused:
            self.pager = _loaded(image, self, str(refused), listener)
        if not self.pager.finished:
            Space().madvise(self.address, self.length, Advice.DONTFORK)
            forks.before_fork(self, RestoredArena._before_fork)
        # No event marks the end of an arena's first use. The working set is therefore recorded when the arena is
        # deleted or the program exits.
        weakref.finalize(self, _learn, working_set, self.pager, options.prefetch, os.getpid())

    def collapse(self) -> int:
        """See `Arena.collapse`. All contents are loaded first: a huge page with missing base pages must not be
        mapped."""
        self.load()
        return super().collapse()

    def register(self, name: str) -> None:
        """See `Arena.register`. Other processes can request deferred contents after the registration."""
        super().register(name)
        assert self._named is not None
        assert self._named.folder is not None
        socket_path = self._named.folder.socket_path(records.SOCKET)
        answers = PagerServer(
            socket_path,
            self.pager,
            str(self.image.path),
            targets.extents(self.image),
            flags=f"/proc/{os.getpid()}/fd/{self._flags}",
            identity=self.image.identity,
        )
        self._named.closers.append(answers.close)
        threading.Thread(target=_answer, args=(self.pager, answers), name="pageferry-pager", daemon=True).start()

    @property
    def deferred(self) -> int:
        """Deferred memory, bytes."""
        return self.pager.pending * SMALL_PAGE

    def ensure(self, offset: int, length: int) -> None:
        """Load a range of the memory (bytes), for callers that read the file without this mapping. Raises ImageError if
        a page cannot be read, UsageError if the range is invalid."""
        self.check_here()
        values.count("offset", offset, 0, self.length)
        if values.count("length", length, 0, self.length) > self.length - offset:
            raise UsageError(
                f"invalid range of {length} bytes at {offset}: expected a range within {self.length} bytes"
            )
        # The image does not contain the memory by which the arena was extended.
        first, end = offset // SMALL_PAGE, min(-(-(offset + length) // SMALL_PAGE), self.image.pages)
        if first < end:
            interruptible(lambda: load_pages(self.pager, first, end - first, str(self.image.path)))

    def load(self) -> None:
        """Load all deferred pages, and wait until the memory is unregistered from userfaultfd.

        Raises ImageError if a page cannot be read or is damaged.
        """
        interruptible(lambda: load_all(self.pager, self.length, str(self.image.path)))

    def _before_fork(self) -> None:
        """Load all contents before a fork, because the child has no pager. A child that only executes a program does
        not map the memory (MADV_DONTFORK), and does not cause this call."""
        load_pages(self.pager, 0, self.image.pages, str(self.image.path))
        Space().madvise(self.address, self.length, Advice.DOFORK)
        forks.forget(self)


@overload
def restore(
    path: str | Path,
    name: None = None,
    *,
    memory: Literal["shared"],
    listener: Listener = ignore,
    **options: Unpack[RestoreArguments],
) -> SharedArena: ...
@overload
def restore(
    path: str | Path,
    name: str | None = None,
    *,
    memory: Literal["own"] = "own",
    listener: Listener = ignore,
    **options: Unpack[RestoreArguments],
) -> RestoredArena: ...
def restore(
    path: str | Path,
    name: str | None = None,
    *,
    memory: Memory = "own",
    listener: Listener = ignore,
    **options: Unpack[RestoreArguments],
) -> RestoredArena | SharedArena:
    """Create an arena from an image. The arena is usable at once: accessed pages are loaded first, the others in the
    background. With a `name`, the arena is registered on this host. `path` can be the URL of an image in a store, whose
    contents are fetched to the cache of this host when they are accessed, and in the background (docs/stores.md).

    If this user cannot handle page faults (including those of system calls), all contents are loaded before this
    function returns, with a warning in the log; `listener` is called with an EagerEvent, which states the reason, and
    with ProgressEvents.

    With `memory="shared"`, all processes of this user on this host that restore the image with this option share one
    copy of its memory. Pages that a process writes to are private. The result is a `SharedArena`, which cannot be saved
    or migrated. Its pages are loaded by one pager process for all of them.

    `options`: with `eager`, load in the background at full speed, without yielding to accesses. With `prefetch=False`,
    load only accessed pages. All other options are those of `Arena`: state, on_pause, on_resume, on_moved, direct_io,
    loop, capacity. The saved state is passed to `state`, or stored in `received_state`. An encrypted image in a store
    requires its key: key or key_command (and allow_plain, see docs/stores.md). The image is only read, and can be
    restored any number of times concurrently; it must not be moved until `deferred` is 0. This call blocks; a coroutine
    awaits `restore_async` instead.

    Raises ImageError if the image cannot be used, UsageError if it is not of an arena, StoreError, WrongKey.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> memoryview(arena)[5000] = 7
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> restored = pageferry.restore("table.img")
        >>> memoryview(restored)[5000]  # loads the page
        7
        >>> restored.load()
        >>> restored.deferred
        0
    """
    return open_arena(path, name, memory, listener, options)


def open_arena(
    path: str | Path, name: str | None, memory: Memory, listener: Listener, options: RestoreArguments
) -> RestoredArena | SharedArena:
    """Like `restore`, for a caller that has collected the options. Raises the same errors."""
    chosen = values.options(RestoredArenaOptions, {**options, "name": name, "memory": memory})
    with local_image("path", path, chosen.keys) as source:
        if chosen.memory == "shared":
            return open_shared(source, chosen, listener)
        return RestoredArena.from_image(
            interruptible(lambda: open_image_file(source, in_own_process=True)), chosen, listener
        )


def open_shared(path: Path, options: RestoredArenaOptions, listener: Listener, *, writable: bool = True) -> SharedArena:
    """Map the memory of an image, shared with other processes. Raises ImageError, RestoreError, UsageError."""
    from pageferry.workloads.arena.shared import SharedArena  # other restores do not need it

    return SharedArena.open(
        path,
        prefetch=options.prefetch,
        eager=options.eager,
        writable=writable,
        on_eager=lambda reason, length: listener(EagerEvent(image=str(path), length=length, reason=reason)),
    )


@overload
async def restore_async(
    path: str | Path,
    name: None = None,
    *,
    memory: Literal["shared"],
    listener: Listener = ignore,
    **options: Unpack[RestoreArguments],
) -> SharedArena: ...
@overload
async def restore_async(
    path: str | Path,
    name: str | None = None,
    *,
    memory: Literal["own"] = "own",
    listener: Listener = ignore,
    **options: Unpack[RestoreArguments],
) -> RestoredArena: ...
async def restore_async(
    path: str | Path,
    name: str | None = None,
    *,
    memory: Memory = "own",
    listener: Listener = ignore,
    **options: Unpack[RestoreArguments],
) -> RestoredArena | SharedArena:
    """Create an arena as `restore` does, without blocking the event loop of the caller. Coroutine callbacks run on this
    loop, unless `loop` is another one.

    The parameters and the result are those of `restore`.
    """
    if options.get("loop") is None and memory != "shared":
        options["loop"] = asyncio.get_running_loop()
    return await in_own_thread(lambda: open_arena(path, name, memory, listener, options))


def _size(image: ImageFile) -> int:
    found = image.metadata
    if found.kind != "arena" or len(found.regions) != 1:
        raise UsageError(
            f"cannot restore {image.path} as an arena: it is an image of {found.name}, a workload of kind {found.kind}"
        )
    return found.regions[0].length


def _learn(working_set: WorkingSet, pager: Pager, prefetch: bool, pid: int) -> None:
    if pid == os.getpid() and pager.touched:  # not in a forked child, and not for an unused arena
        working_set.learn(pager.touched, prefetch)


def _pager(image: ImageFile, arena: RestoredArena, working_set: list[int], options: RestoredArenaOptions) -> Pager:
    mapping = Mapping(arena.descriptor, arena.length)
    target = TargetRegion(mapping, SMALL_PAGE, targets.large_units(image)[0])
    order = fill_order(image, working_set) if options.prefetch else FillOrder((), ())
    space = Space()
    userfaults, _ = page_faults.userfaults({os.getpid(): space})
    try:
        segment = MappedSegment(space, arena.address, arena.length)
        return Pager(
            image.chain,
            [target],
            [segment],
            userfaults,
            arena._flags,
            windows=order.windows,
            blocks=order.blocks,
            fill=("eager" if options.eager else "gentle") if options.prefetch else "none",
            read_ahead=options.prefetch,
            on_failure="sigbus",
            checks_removals=True,
        )
    finally:
        os.close(userfaults[os.getpid()])


def _loaded(image: ImageFile, arena: RestoredArena, reason: str, listener: Listener) -> Pager:
    """Load all contents now, and return the pager, which has finished. Raises ImageError."""
    log.warning(
        "%s: loading all %d MiB in advance, because on-demand loading is unavailable: %s",
        image.path,
        arena.length >> 20,
        reason,
    )
    mapping = Mapping(arena.descriptor, arena.length)
    return load(image, [TargetRegion(mapping, SMALL_PAGE, targets.large_units(image)[0])], reason, listener)


def _answer(pager: Pager, answers: PagerServer) -> None:
    """Wait until all contents are present or the server is closed, and close it. This thread then no longer refers to
    the pager."""
    while not answers.closed.is_set() and not pager.wait(1.0, len(pager.failures)):
        pass
    answers.close()
