"""Server of a pager: replies to the requests of `pager.protocol`."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pageferry._engine import Failure, Pager
from pageferry.host import files
from pageferry.images.metadata import ImageIdentity
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager.protocol import MAX_TOUCHED, HoldGiven, PagerRequest, PagerStatus


class _Hold:
    """Acquisition of the pager by one client; ends when the client releases the pager or closes the connection."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self._held = False

    def give(self, regions: int) -> HoldGiven:
        """Acquire the pager for this client. Return the reply, which is `busy` if another client has acquired the
        pager."""
        try:
            userfaults = self._pager.hold()
        except OSError as error:
            return HoldGiven(pager=os.getpid(), busy=error.errno == errno.EBUSY)
        self._held = userfaults is not None
        large = [bytes(self._pager.large(region)) for region in range(regions)]
        return HoldGiven(pager=os.getpid(), userfaults=userfaults, large=large)

    def release(self) -> None:
        """Release the pager, if it is acquired."""
        if self._held:
            self._held = False
            self._pager.release()


class PagerServer:
    """Server that replies to requests on a socket until it is closed, with one thread per client.

    `origin`: origin of the contents, for error messages; `regions`: name and length of each region; `flags`: path of
    the deferred bitmap, if not in the workload's directory; `identity`: identity of the image.
    """

    def __init__(
        self,
        path: str | Path,
        pager: Pager,
        origin: str,
        regions: Sequence[tuple[str, int]],
        flags: str = "",
        identity: ImageIdentity | None = None,
    ) -> None:
        self.path = Path(path)
        self.pager = pager
        self.origin = origin
        self.regions = list(regions)
        self.flags = flags
        self.identity = identity
        self.paused: str | None = None
        """Reason why no pages can be received now; None if pages can be received."""
        self.asked_to_stop = threading.Event()
        self.closed = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):  # left by a pager that was killed
            self.path.unlink()
        files.bind_private(self._listener, str(self.path))
        self._listener.listen(16)
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="pageferry-pager", daemon=True).start()

    def close(self) -> None:
        """Stop serving. Replies in progress are completed."""
        if self.closed.is_set():  # a later workload may have a socket at this path
            return
        self.closed.set()
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)

    def status(self, error: str | None = None, touched: Sequence[int] = ()) -> PagerStatus:
        """Return the status of the pager."""
        pager = self.pager
        counters, failures = pager.counters, pager.failures
        return PagerStatus(
            image=self.origin,
            pager=os.getpid(),
            identity=self.identity,
            deferred=pager.pending * SMALL_PAGE,
            finished=pager.finished,
            faults=counters.faults,
            missed=counters.missed,
            loaded=counters.loaded,
            prefetched=counters.prefetched,
            bytes_read=counters.bytes_read,
            service=counters.service,
            longest=counters.longest,
            histogram=pager.histogram,
            failures=[self.describe(failure) for failure in failures],
            accessed=sum(failure.accessed for failure in failures),
            touched=list(touched),
            flags=self.flags,
            paused=self.paused,
            error=error,
        )

    def describe(self, failure: Failure) -> str:
        """Describe a page that cannot be read."""
        page, name = failure.page, self.regions[failure.region][0]
        where = f"page {page} of {name} (at byte {page * SMALL_PAGE})"
        return f"{where} cannot be read from {self.origin}: {failure.message}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the server has been closed
                return
            threading.Thread(target=self._serve, args=(connection,), name="pageferry-pager", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self._connections.add(connection)
        hold = _Hold(self.pager)
        try:
            with connection, connection.makefile("rwb") as lines, contextlib.suppress(OSError):
                for line in lines:
                    lines.write(msgspec.json.encode(self._answer(line, hold)) + b"\n")
                    lines.flush()
        finally:
            hold.release()
            self._connections.discard(connection)

    def _answer(self, line: bytes, hold: _Hold) -> PagerStatus | HoldGiven:
        try:
            request = msgspec.json.decode(line, type=PagerRequest)
            if request.what == "hold":
                return hold.give(len(self.regions))
            if request.what == "release":
                hold.release()
            return self._do(request)
        except (ValueError, OSError) as error:
            return self.status(f"{self.origin}: {error}")

    def _do(self, request: PagerRequest) -> PagerStatus:
        if self.paused is not None and request.what in ("ensure", "settle"):
            return self.status(f"cannot load deferred contents from {self.origin}: {self.paused}")
        match request.what:
            case "ensure":
                self.pager.ensure(request.region, request.first, request.count)
            case "settle":
                for number, (_, length) in enumerate(self.regions):
                    self.pager.ensure(number, 0, length // SMALL_PAGE)
                while not self.pager.wait(1.0, len(self.pager.failures)):
                    pass
            case "touched":
                return self.status(touched=self.pager.touched[request.first :][:MAX_TOUCHED])
            case "stop":
                self.asked_to_stop.set()
            case "status" | "hold" | "release":
                pass
        return self.status()
