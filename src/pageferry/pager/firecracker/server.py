"""Server of a socket to which Firecracker connects: one task per microVM, and one image for all of them.

Only processes of the user of the pager can connect (mode 0600), unless the owner or the mode of the socket is changed
afterwards. A process that connects receives the memory in the image through its own userfaultfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Coroutine, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from pageferry.errors import PageferryError, RestoreError, UsageError, WorkloadDied
from pageferry.events import Listener
from pageferry.host import files
from pageferry.host.blocking import in_thread, to_the_end
from pageferry.host.registry import MAX_SOCKET_PATH
from pageferry.images import targets
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager.firecracker.events import MicrovmRefused, ServeResult, Serving
from pageferry.pager.firecracker.handshake import Receiver
from pageferry.pager.firecracker.microvm import Microvm
from pageferry.pager.firecracker.options import ServeOptions
from pageferry.pager.firecracker.peer import Peer

log = getLogger(__name__)

MAX_HANDSHAKES = 64
"""Maximum number of connections whose handshake is incomplete. Others wait until one of them has ended."""
MAX_REPORTED = 1000
_RETRY = 0.2
"""Time until the next attempt to accept a connection after an error, seconds."""


class Server:
    """Server of one image. The constructor listens on the socket: Firecracker can connect when it returns.

    Raises UsageError if the image is not that of a snapshot of Firecracker, or if the socket cannot be created.
    """

    def __init__(self, image: ImageFile, path: Path, options: ServeOptions, listener: Listener) -> None:
        targets.check_firecracker(image)
        self.image = image
        self.path = path.absolute()
        self._options = options
        self._report = listener
        self._microvms = self._loaded = 0
        """Number of microVMs that have connected, and of those whose memory was loaded completely."""
        self._failed: list[str] = []
        """Failures of the first `MAX_REPORTED` microVMs that have failed."""
        self._full = False
        """Whether the server refuses further microVMs."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._enough = asyncio.Event()
        self._handshakes = asyncio.Semaphore(MAX_HANDSHAKES)
        self._listener = _listen(self.path)
        self._inode = os.stat(self.path).st_ino

    @property
    def serving(self) -> Serving:
        """Event that the socket accepts connections."""
        return Serving(
            image=str(self.image.path),
            socket=str(self.path),
            pager=os.getpid(),
            memory=self.image.pages * SMALL_PAGE,
        )

    async def run(self) -> ServeResult:
        """Serve until the requested number of microVMs have connected and ended. On cancellation, kill or stop those
        whose memory is not loaded completely."""
        accepting = asyncio.ensure_future(self._accept())
        try:
            await self._enough.wait()
            await _cancel([accepting])
            self._refuse_pending()
            while self._tasks:
                await asyncio.wait(self._tasks)
            return self._result()
        finally:
            await to_the_end(_cancel([accepting]))
            self._refuse_pending()
            await to_the_end(_cancel([*self._tasks]))

    def _refuse_pending(self) -> None:
        """Close the socket, and refuse the connections that it has not accepted: their processes wait for memory."""
        self._full = True
        while self._inode:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            connection.setblocking(False)
            self._begin(self._refuse_next(connection))
        self.close()

    async def _refuse_next(self, connection: socket.socket) -> None:
        with connection:
            await to_the_end(self._connect(connection))

    def close(self) -> None:
        """Close the socket and remove it. May be called twice."""
        self._listener.close()
        with contextlib.suppress(OSError):
            if self._inode and os.stat(self.path).st_ino == self._inode:
                self.path.unlink()
        self._inode = 0

    def _result(self) -> ServeResult:
        return ServeResult(
            image=str(self.image.path),
            socket=str(self.path),
            microvms=self._microvms,
            loaded=self._loaded,
            failed=self._failed,
        )

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._handshakes.acquire()
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # such as too many open files
                log.error("cannot accept a connection on %s: %s; retrying", self.path, error.strerror)
                self._handshakes.release()
                await asyncio.sleep(_RETRY)
                continue
            self._begin(self._serve(connection))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a microVM is no longer served: %s", error, exc_info=error)

    async def _serve(self, connection: socket.socket) -> None:
        """Serve the microVM of a connection. An error of one connection does not affect others."""
        with connection:
            try:
                microvm = await self._connect(connection)
            finally:
                self._handshakes.release()
            if microvm is not None:
                try:
                    await microvm.serve(self._report)
                finally:
                    self._count(microvm)

    def _count(self, microvm: Microvm) -> None:
        """Record the end of a microVM, which then frees its memory and descriptors."""
        self._loaded += microvm.loaded
        if microvm.failed is not None and len(self._failed) < MAX_REPORTED:
            self._failed.append(f"microVM {microvm.peer.pid}: {microvm.failed}")

    async def _connect(self, connection: socket.socket) -> Microvm | None:
        """Receive the handshake and start the pager. Return None if the connection is refused."""
        receiver, peer = Receiver(connection), None
        try:
            peer = Peer(connection)
            handshake = await receiver.receive()
            try:
                if self._full:
                    raise RestoreError("the pager serves no more microVMs")
                microvm = await to_the_end(in_thread(Microvm, self.image, handshake, peer, self._options))
            finally:
                handshake.close()
        except (PageferryError, OSError, ValueError) as error:
            await self._refuse(peer, error, waits=receiver.has_userfault)
            return None
        except asyncio.CancelledError:
            await to_the_end(self._refuse(peer, RestoreError("the pager was stopped"), waits=receiver.has_userfault))
            raise
        self._microvms += 1
        if self._microvms == self._options.microvms:
            self._enough.set()
        return microvm

    async def _refuse(self, peer: Peer | None, error: Exception, *, waits: bool) -> None:
        """Report a refused connection. Kill or stop a process that waits for its memory."""
        action = self._options.on_failure if waits and not isinstance(error, WorkloadDied) else "none"
        pid = peer.pid if peer is not None else 0
        log.error("refused the connection of process %d: %s; action: %s", pid, error, action)
        if peer is not None:
            failed = await peer.stop(action)
            if failed is not None:
                log.error("%s", failed)
            peer.close()
        self._report(MicrovmRefused(microvm=pid, reason=str(error), action=action))


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _listen(path: Path) -> socket.socket:
    """Listen on a Unix socket that only this user can connect to. Replace a socket on which no process listens.

    Raises UsageError.
    """
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise UsageError(f"cannot listen on {path}: the path is longer than {MAX_SOCKET_PATH} bytes; use a shorter one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_unused(path)
        files.bind_private(listener, str(path))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {path}: {error.strerror or error}; use another path") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_unused(path: Path) -> None:
    """Remove a socket that a killed pager has left. Raises UsageError if a process listens on it, or if it is not a
    socket, OSError."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"cannot listen on {path}: the file exists and is not a socket; use another path")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise
        else:
            raise UsageError(f"cannot listen on {path}: another process listens on it; use another path")
    path.unlink()
