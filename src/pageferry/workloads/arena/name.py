"""Name of an arena on this host: its directory below the run directory, and the control socket in that directory.

A name must not keep its arena alive. Therefore, the threads of the socket and the function registered with atexit have
at most a weak reference to the arena. An arena that its program no longer references is garbage-collected.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import warnings
from collections.abc import Callable
from typing import Protocol

from pageferry.errors import ImageError, RestoreError
from pageferry.host import forks, registry
from pageferry.host.blocking import interruptible
from pageferry.pager import client, records
from pageferry.workloads.arena.control_socket.server import ControlServer, Owned
from pageferry.workloads.persistent_trace import record_fork


class Nameable(Owned, Protocol):
    """Arena that can be given a name."""

    @property
    def handed_out(self) -> bool:
        """Whether the program has obtained a descriptor of the memory."""


class NamedArena:
    """Name of one arena, claimed by this process. The constructor raises NameInUse, UsageError."""

    def __init__(self, arena: Nameable, name: str) -> None:
        self._owner = os.getpid()
        self._abandoned = False
        self.closers: list[Callable[[], object]] = []
        """Functions that are called when the name is released."""
        folder = registry.Registry().claim(name)
        server: ControlServer | None = None
        try:
            if arena.handed_out:
                records.mark_handed_out(folder)
            path = folder.socket_path("control.sock")
            self._server = server = ControlServer(arena, path, self._stopped)
            folder.publish(registry.ArenaEntry(**registry.identify(os.getpid()), control_socket=path))
        except BaseException:
            if server is not None:
                server.close()
            folder.release()
            raise
        self.folder: registry.Folder | None = folder
        """Directory of the name; None after the name has been released."""
        forks.before_fork(self, NamedArena._before_fork)
        atexit.register(self.close)

    def _before_fork(self) -> None:
        """Record the fork, and load contents that are in a store, because the child has no pager. Raises RestoreError,
        ImageError."""
        if self.folder is not None:
            record_fork(self.folder)
            if os.getpid() == self._owner:
                load_stored(self.folder)

    def release(self) -> None:
        """Release the name: accept no further clients, load stored contents, and remove the directory. Do nothing in a
        forked child. Raises RestoreError, ImageError."""
        folder, self.folder = self.folder, None
        if folder is None or os.getpid() != self._owner:
            return
        load_stored(folder)
        atexit.unregister(self.close)
        self._server.stop_listening()
        while self.closers:
            self.closers.pop()()
        folder.release()

    def close(self) -> None:
        """Release the name, and disconnect the clients."""
        self.release()
        self._server.close()

    def abandon(self, arena: object) -> None:
        """If an arena that is being garbage-collected still has its name, emit a ResourceWarning, and have the thread
        of the server release the name.

        The garbage collector can run at any point, even while this thread holds the lock of the run directory.
        Therefore, this method must not block.
        """
        if self.folder is not None and os.getpid() == self._owner:
            warnings.warn(f"unclosed {arena!r}: close it, or use it in a with statement", ResourceWarning, 2, arena)
            self._abandoned = True
            self._server.stop_listening()

    def _stopped(self) -> None:
        """Release the name in the thread of the server, which no longer accepts clients."""
        if self._abandoned:
            with contextlib.suppress(RestoreError, ImageError):  # the contents are not needed: the arena has been freed
                self.close()


def load_stored(folder: registry.Folder) -> None:
    """Load all contents that other processes have moved to a store, and wait until the pager of the store no longer
    needs the directory.

    Raises RestoreError if the pager has exited, ImageError if the store cannot be read.
    """
    if (folder.path / records.RECORD).exists():
        interruptible(lambda: client.wait_complete(folder))
        while (folder.path / records.RECORD).exists():  # the pager may reply before it removes the record
            time.sleep(0.005)
