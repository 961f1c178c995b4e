"""Pager service of one workload: everything that does not depend on the source of the contents.

The source is an image (`image_pager`), including that of a cold store, or the source of a post-copy migration
(`migration.postcopy_destination`). The callers provide a function that creates the engine's pager.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Mapping, Sequence

from pageferry._engine import Pager
from pageferry.host import proc
from pageferry.host.registry import Folder
from pageferry.images.metadata import ImageIdentity
from pageferry.memory.regions import SMALL_PAGE, Region
from pageferry.pager import page_faults, records
from pageferry.pager.server import PagerServer

MakePager = Callable[[dict[int, int], int], Pager]
"""Function that creates a pager from this process's descriptors of the userfaultfds, by process id, and from the
descriptor of the deferred bitmap."""


class PagerService:
    """Memory of a workload, its userfaultfds and deferred bitmap, its pager, and the server for requests to the pager.

    `folder`: directory of the workload; None for a workload that is not registered. The constructor raises
    CannotHandleFaults, ProcessLookupError.
    """

    def __init__(self, regions: Sequence[Region], folder: Folder | None) -> None:
        self.regions = tuple(regions)
        self.folder = folder
        self.spaces = page_faults.open_spaces(
            dict.fromkeys(segment.pid for region in self.regions for segment in region.segments)
        )
        self.userfaults: dict[int, int] = {}
        """Number of the userfaultfd in each process, by pid."""
        self._started = {pid: proc.start_time(pid) for pid in self.spaces}
        self._flags: int | None = None
        self._pager: Pager | None = None
        self._server: PagerServer | None = None

    # -- start

    def take_bitmap(self, folder: Folder) -> None:
        """Open the deferred bitmap that another pager has left. Raises the same errors as `records.open_flags`."""
        self._flags = records.open_flags(folder, self._bitmap_length)

    @property
    def _bitmap_length(self) -> int:
        return Pager.flags_length(sum(region.length for region in self.regions) // SMALL_PAGE)

    def start(self, make: MakePager, taken_over: Mapping[int, int] | None = None) -> None:
        """Start the pager. `taken_over`: by pid, the numbers of the userfaultfds that another pager has left in the
        processes; requires `take_bitmap`. If None, create a userfaultfd in each process, and a bitmap.

        Raises CannotHandleFaults; after an error, no process keeps a new descriptor.
        """
        if taken_over is None:
            ours, self.userfaults = page_faults.userfaults(self.spaces)
        else:
            ours, self.userfaults = self._descriptors(taken_over), dict(taken_over)
        try:
            if self._flags is None:
                self._flags = records.create_flags(self.folder, self._bitmap_length)
            self._pager = make(ours, self._flags)
        except BaseException:
            if taken_over is None:
                self.release_userfaults()
            raise
        finally:
            for descriptor in ours.values():
                os.close(descriptor)

    def _descriptors(self, userfaults: Mapping[int, int]) -> dict[int, int]:
        return {pid: self.spaces[pid].descriptor(number) for pid, number in userfaults.items()}

    def serve(self, origin: str, identity: ImageIdentity | None = None) -> None:
        """Start to serve requests on the socket in the workload's directory, if there is a directory. `origin`: origin
        of the contents, for error messages."""
        if self.folder is not None:
            extents = [(region.name, region.length) for region in self.regions]
            path = self.folder.socket_path(records.SOCKET)
            self._server = PagerServer(path, self.pager, origin, extents, identity=identity)

    # -- state

    @property
    def started(self) -> bool:
        """Whether the pager was started."""
        return self._pager is not None

    @property
    def pager(self) -> Pager:
        """Pager. Raises RuntimeError before `start`."""
        if self._pager is None:
            raise RuntimeError("cannot use the pager: it has not been started")
        return self._pager

    @property
    def server(self) -> PagerServer | None:
        """Server of requests; None before `serve`, after `close`, or if the workload has no directory."""
        return self._server

    def ended(self) -> int | None:
        """Return the pid of a process of the workload that has exited; None if all are running."""
        return next((pid for pid, started in self._started.items() if proc.start_time(pid) != started), None)

    # -- end

    def forget(self, record: str) -> None:
        """Remove the record and the bitmap, after all contents are loaded.

        The record is removed first, because another pager cannot take over with a record alone. For the same reason,
        call this method before `release_userfaults`.
        """
        if self.folder is not None:
            self.folder.forget(record)
            (self.folder.path / records.FLAGS).unlink(missing_ok=True)

    def release_userfaults(self) -> None:
        """Close the userfaultfds in the processes of the workload."""
        for pid, number in self.userfaults.items():
            with contextlib.suppress(OSError):
                self.spaces[pid].close_fd(number)

    def close(self) -> None:
        """Stop the pager. Missing pages stay missing, so that another pager can take over. May be called twice."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        if self._pager is not None:
            self._pager.stop()
        flags, self._flags = self._flags, None
        if flags is not None:
            fcntl.flock(flags, fcntl.LOCK_UN)
            os.close(flags)
