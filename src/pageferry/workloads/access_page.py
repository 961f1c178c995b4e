"""Access page of an arena: a small shared file that coordinates its owner and the processes that map its memory.

The owner stores in it whether the memory may be mapped. A process that attaches the arena, or maps the memory by which
the arena has grown, stores a random mark after it has mapped the memory and before it writes. So does the child of a
fork, which inherits the mapping but not its write protection. The owner compares the marks at the beginning and at the
end of an operation, and so also finds processes that have mapped the memory and exited in between.

A mapper stores its mark, then reads the access. The owner closes the access, then reads the mark. Therefore, either the
mapper waits until the pause ends, or the owner's operation fails.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol, Self, TypeVar

from pageferry import _engine
from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host import proc
from pageferry.memory.regions import SMALL_PAGE
from pageferry.workloads.handle import OpenFile

WAIT = 60.0
"""Maximum time that a mapper waits for the end of a pause, seconds."""
_POLL = 0.002
"""Time between two reads of the access during a wait, seconds."""
_ACCESS_AT, _MARK_AT, _TRACED_AT, _PID_AT, _STARTED_AT = range(5)
"""Positions of the fields, in units of 8 bytes."""


class Access(IntEnum):
    """Whether other processes may map the memory of an arena."""

    OPEN = 1
    """The arena runs."""
    PAUSED = 2
    """The arena is paused: a mapper waits."""
    CLOSED = 3
    """The arena has been migrated, or may run at the destination: writes would be lost."""


class Mapped(Protocol):
    """Mapping of the memory of an arena."""

    def close_memory(self) -> None:
        """Make the memory read-only."""


M = TypeVar("M", bound=Mapped)


class AccessPage:
    """Access page of an arena. The owner creates it; `over` opens it in another process. A forked child inherits it."""

    def __init__(self) -> None:
        file = os.memfd_create("arena-access", os.MFD_CLOEXEC)
        try:
            os.ftruncate(file, SMALL_PAGE)
            self._map(file)
        finally:
            os.close(file)
        self._words[_PID_AT] = os.getpid()
        self._words[_STARTED_AT] = proc.start_time(os.getpid()) or 0
        self._words[_ACCESS_AT] = Access.OPEN

    @classmethod
    def over(cls, file: int) -> Self:
        """Open the page of another process. `file`: descriptor of the page, which is duplicated. Raises OSError."""
        self = cls.__new__(cls)
        self._map(file)
        return self

    def _map(self, file: int) -> None:
        self._memory = _engine.Mapping(file, SMALL_PAGE)
        self._words = memoryview(self._memory).cast("Q")
        self._fence = threading.Lock()
        _pages.add(self)

    @property
    def file(self) -> OpenFile:
        """Descriptor and identity of the page, by which another process opens it."""
        descriptor = self._memory.fileno()
        status = os.fstat(descriptor)
        return OpenFile(descriptor=descriptor, device=status.st_dev, inode=status.st_ino)

    # -- owner

    def set(self, access: Access) -> None:
        """Store whether the memory may be mapped. Do nothing in a forked child, which is not the owner."""
        if self.is_owner:
            self._words[_ACCESS_AT] = access
            self._order()

    @property
    def is_owner(self) -> bool:
        """Whether this process created the page: the children of a fork did not."""
        return os.getpid() == self._words[_PID_AT]

    def trace(self, length: int) -> None:
        """Record that the mappings of the first `length` bytes are about to be read from /proc. From then on, a process
        that maps a part of them leaves a mark."""
        self._words[_TRACED_AT] = max(length, self._words[_TRACED_AT])
        self._order()

    @property
    def mark(self) -> int:
        """Mark of the last process that has mapped memory; 0 before the first one."""
        return self._words[_MARK_AT]

    # -- other processes

    def map(self, name: str, start: int, call: Callable[[], M]) -> M:
        """Map the memory from offset `start` on by `call`, once the arena is not paused. Return its result.

        Raises WorkloadError if the arena has been migrated or stays paused, WorkloadDied if its owner exits while it is
        paused. If the memory has been mapped by then, it is made read-only.
        """
        self._wait(name)
        mapped = call()
        self._order()
        if start < self._words[_TRACED_AT]:
            self._leave_mark()
        try:
            self._wait(name)
        except BaseException:
            mapped.close_memory()
            raise
        return mapped

    def _wait(self, name: str) -> None:
        """Wait while the arena is paused. Raises WorkloadError, WorkloadDied."""
        pid, started = self._words[_PID_AT], self._words[_STARTED_AT]
        limit = time.monotonic() + WAIT
        while (access := self._words[_ACCESS_AT]) != Access.OPEN:
            if access != Access.PAUSED:
                raise WorkloadError(
                    f"cannot map the memory of {name}: process {pid} has migrated it to another process or host; use "
                    "it there"
                )
            if not proc.is_alive(pid, started):
                raise WorkloadDied(f"cannot map the memory of {name}: its owner, process {pid}, has exited")
            if time.monotonic() > limit:
                raise WorkloadError(
                    f"cannot map the memory of {name}: process {pid} has paused it for {WAIT:.0f} s; retry when its "
                    "migration or checkpoint has finished"
                )
            time.sleep(_POLL)

    def _leave_mark(self) -> None:
        self._words[_MARK_AT] = int.from_bytes(os.urandom(8), "little")
        self._order()

    def _order(self) -> None:
        """Order earlier stores before later loads: the instruction that acquires a lock is a full barrier."""
        with self._fence:
            pass


_pages: weakref.WeakSet[AccessPage] = weakref.WeakSet()


def _after_fork() -> None:
    """Store marks, because the child has inherited all mappings. Replace the fences, which another thread of the parent
    may have held."""
    for page in list(_pages):
        page._fence = threading.Lock()
        page._leave_mark()


os.register_at_fork(after_in_child=_after_fork)
