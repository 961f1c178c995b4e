"""Arenas from images: usable at once, their memory arriving on access (S10)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import weakref
from logging import getLogger
from pathlib import Path
from typing import Self

from pageferry import values
from pageferry._engine import Mapping, Pager, Space
from pageferry.checkpoints.eager import load
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import interruptible
from pageferry.images import targets
from pageferry.images.image import ImageFile
from pageferry.images.working_set import WorkingSet
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import page_faults, records
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.server import PagerServer
from pageferry.workloads.arena.arena import Arena, State, memory_file
from pageferry.workloads.arena.arguments import check_arena
from pageferry.workloads.callbacks import Callback, Plain
from pageferry.workloads.deferred_access import load_all, load_pages

log = getLogger(__name__)


class RestoredArena(Arena):
    """An arena whose contents come from an image, on access or in the background, whichever is first.

    An access to a page that cannot be read, because the image is damaged or gone, ends the program with SIGBUS, after
    a message: never in zeros. `ensure` and `load` raise ImageError instead.
    """

    image: ImageFile
    pager: Pager
    _flags: int
    """Descriptor of the pager's flags, for who looks at them from outside."""

    @classmethod
    def from_image(
        cls,
        image: ImageFile,
        name: str | None = None,
        *,
        eager: bool = False,
        prefetch: bool = True,
        state: State | None = None,
        on_pause: Callback | None = None,
        on_resume: Plain | None = None,
        on_moved: Plain | None = None,
        direct_io: bool = True,
        loop: asyncio.AbstractEventLoop | None = None,
        listener: Listener = ignore,
    ) -> Self:
        """See `restore`."""
        size = _size(image)
        file, large_pages_by = memory_file(size)
        try:
            self = cls.from_file(
                file,
                size,
                state=state,
                on_pause=on_pause,
                on_resume=on_resume,
                on_moved=on_moved,
                direct_io=direct_io,
                loop=loop,
                private=True,
            )
            self.large_pages_by = large_pages_by
            self.image = image
            working_set = WorkingSet(image)
            self._flags = records.create_flags(None, Pager.flags_length(image.pages))
            weakref.finalize(self, os.close, self._flags)
            try:
                self.pager = _pager(image, self, working_set.windows, eager=eager, prefetch=prefetch)
            except CannotHandleFaults as refused:
                self.pager = _loaded(image, self, str(refused), listener)
        finally:
            os.close(file)
        if not self.pager.finished:
            _inherit(self, _MADV_DONTFORK)
            _restoring.add(self)
        # Of an arena nobody says when its first use is over: it is learnt when the arena goes, or the program.
        weakref.finalize(self, _learn, working_set, self.pager, prefetch, os.getpid())
        self.lifecycle.load_state(self, image.state())
        if name is not None:
            self.register(name)
        self.lifecycle.resume(self)
        return self

    def collapse(self) -> int:
        """As of `Arena`. All contents are brought first: a large page that is not all there must not be mapped."""
        self.load()
        return super().collapse()

    def register(self, name: str) -> None:
        """As of `Arena`; other processes can ask for contents that are still to come."""
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
        """Bytes whose contents are still to come."""
        return self.pager.pending * SMALL_PAGE

    def ensure(self, offset: int, length: int) -> None:
        """Bring part of the memory in, for who reads the file past this mapping. Raises ImageError, UsageError."""
        self.check_here()
        values.count("offset", offset, 0, self.length)
        if values.count("length", length, 0, self.length) > self.length - offset:
            raise UsageError(f"{length} bytes at {offset} of an arena of {self.length}")
        first, end = offset // SMALL_PAGE, -(-(offset + length) // SMALL_PAGE)
        interruptible(lambda: load_pages(self.pager, first, end - first, str(self.image.path)))

    def load(self) -> None:
        """Bring everything in, and wait until nothing traps any more. Raises ImageError."""
        interruptible(lambda: load_all(self.pager, self.length, str(self.image.path)))


def restore(
    path: str | Path,
    name: str | None = None,
    *,
    eager: bool = False,
    prefetch: bool = True,
    state: State | None = None,
    on_pause: Callback | None = None,
    on_resume: Plain | None = None,
    on_moved: Plain | None = None,
    direct_io: bool = True,
    loop: asyncio.AbstractEventLoop | None = None,
    listener: Listener = ignore,
) -> RestoredArena:
    """An arena with the contents of an image, usable at once: what is touched is read first, the rest meanwhile.

    Where this user may not handle page faults (of system calls, too), all contents are loaded before this returns, with
    a warning in the log; `listener` is called with an EagerEvent, which has the reason, and with ProgressEvents.

    `eager`: the rest at full speed, without giving way to accesses; `prefetch=False`: nothing but what is touched.
    The others are those of `Arena`. The state that was saved is given to `state`, or kept in `received_state`. The
    image is only read, and may be restored any number of times at once; it must stay where it is until `deferred` is 0.
    This call blocks: a coroutine whose loop is to run coroutine callbacks makes it with `asyncio.to_thread`, and passes
    the loop as `loop`.

    Raises ImageError when the image cannot be used, UsageError when it is not of an arena.
    """
    check_arena(name, state, on_pause, on_resume, on_moved, eager=eager, prefetch=prefetch)
    return RestoredArena.from_image(
        interruptible(lambda: ImageFile(values.path("path", path))),
        name,
        eager=eager,
        prefetch=prefetch,
        state=state,
        on_pause=on_pause,
        on_resume=on_resume,
        on_moved=on_moved,
        direct_io=direct_io,
        loop=loop,
        listener=listener,
    )


def _size(image: ImageFile) -> int:
    found = image.metadata
    if found.kind != "arena" or len(found.regions) != 1:
        raise UsageError(
            f"{image.path} is of {found.name}, a workload of kind {found.kind}: no arena can be made of it"
        )
    return found.regions[0].length


def _learn(working_set: WorkingSet, pager: Pager, prefetch: bool, pid: int) -> None:
    if pid == os.getpid() and pager.touched:  # not in a forked child, nor of an arena that was not used
        working_set.learn(pager.touched, prefetch)


def _pager(image: ImageFile, arena: RestoredArena, working_set: list[int], *, eager: bool, prefetch: bool) -> Pager:
    mapping = Mapping(arena.descriptor, arena.length)
    target = (mapping, SMALL_PAGE, targets.large_units(image)[0])
    space = Space()
    userfaults, _ = page_faults.userfaults({os.getpid(): space})
    try:
        segment = (space, arena.address, arena.length, 0, 0)
        return Pager(
            image.chain,
            [target],
            [segment],
            userfaults,
            arena._flags,
            working_set=working_set if prefetch else [],
            background=prefetch,
            eager=eager,
            fatal=True,
            checks_removals=True,
        )
    finally:
        os.close(userfaults[os.getpid()])


def _loaded(image: ImageFile, arena: RestoredArena, reason: str, listener: Listener) -> Pager:
    """Load all contents now. Raises ImageError."""
    log.warning("%s: loading all %d MiB now, not on demand: %s", image.path, arena.length >> 20, reason)
    mapping = Mapping(arena.descriptor, arena.length)
    return load(image, [(mapping, SMALL_PAGE, targets.large_units(image)[0])], reason, listener)


def _answer(pager: Pager, answers: PagerServer) -> None:
    """Close the server when all contents are present. The pager is not kept once the arena has given up its name."""
    while not answers.closed.is_set() and not pager.wait(1.0, len(pager.failures)):
        pass
    answers.close()


_MADV_DONTFORK, _MADV_DOFORK = 10, 11
_libc = ctypes.CDLL(None)


def _inherit(arena: Arena, advice: int) -> None:
    _libc.madvise(ctypes.c_void_p(arena.address), ctypes.c_size_t(arena.length), advice)


_restoring: weakref.WeakSet[RestoredArena] = weakref.WeakSet()


def _before_fork() -> None:
    """A child has no pager: its pages must all be there, or the arena is not mapped in it.

    One that only executes a program does not come here.
    """
    for arena in list(_restoring):
        load_pages(arena.pager, 0, arena.length // SMALL_PAGE, str(arena.image.path))
        _inherit(arena, _MADV_DOFORK)
        _restoring.discard(arena)


os.register_at_fork(before=_before_fork)
