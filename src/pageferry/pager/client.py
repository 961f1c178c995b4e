"""Client of a pager (S8).

A reader that bypasses the page tables of the workload calls `ensure` first. A migration or a checkpoint acquires the
pager, and installs write traces on these page tables with the userfaultfd of the pager (`workloads.deferred_access`). A
caller that needs exclusive use of the page tables calls `wait_complete`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TypeVar

import msgspec

from pageferry.errors import ImageError, RestoreError
from pageferry.host.registry import Folder
from pageferry.images.metadata import ImageIdentity
from pageferry.pager.protocol import PagerRequest, PagerStatus
from pageferry.pager.records import FLAGS, POSTCOPY, RECORD, SOCKET, Deferred, is_restoring

_TIMEOUT = 5.0
"""Timeout for replies to requests that load no pages, seconds."""

HANDOVER = 1.0
"""Maximum time between the exit of one pager and the start of the next, seconds."""

Reply = TypeVar("Reply", bound=msgspec.Struct)


class Connection:
    """Connection to the pager of a workload, for one request at a time. The constructor raises OSError if no pager
    listens.

    `timeout`: maximum time to wait for a reply, seconds; None for no limit.
    """

    def __init__(self, folder: Folder, timeout: float | None = None) -> None:
        self.folder = folder
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._replies = self._socket.makefile("rb")
        try:
            self._socket.connect(str(folder.path / SOCKET))
        except BaseException:
            self.close()
            raise

    def exchange(self, request: PagerRequest, kind: type[Reply]) -> Reply:
        """Send a request, and return the reply. Raises OSError, msgspec.MsgspecError."""
        self._socket.sendall(msgspec.json.encode(request) + b"\n")
        line = self._replies.readline()
        if not line:
            raise ConnectionResetError("the pager closed the connection without a reply")
        return msgspec.json.decode(line, type=kind)

    def ask(self, request: PagerRequest, kind: type[Reply]) -> Reply:
        """Send a request, and return the reply. Raises RestoreError, ImageError."""
        try:
            reply = self.exchange(request, kind)
        except (OSError, ValueError) as failed:
            raise gone(self.folder, failed) from failed
        if isinstance(reply, PagerStatus):
            check(reply)
        return reply

    def cut(self) -> None:
        """Shut down the connection, so that a request in progress fails."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._replies.close()
        self._socket.close()


def connect(folder: Folder) -> Connection:
    """Connect to the pager. Retry for `HANDOVER` seconds, because another pager may be taking over. Raises
    RestoreError."""
    deadline = time.monotonic() + HANDOVER
    while True:
        try:
            return Connection(folder)
        except OSError as failed:
            if time.monotonic() > deadline:
                raise gone(folder, failed) from failed
        time.sleep(0.02)


def ask(folder: Folder, request: PagerRequest, timeout: float | None = _TIMEOUT) -> PagerStatus | None:
    """Send a request to the pager of a workload; return its reply, or None if no restore is in progress.

    Raises RestoreError if the pager of a restore in progress does not respond, ImageError if the image cannot be read.
    """
    if not is_restoring(folder):
        return None
    deadline = time.monotonic() + HANDOVER
    while True:
        try:
            with contextlib.closing(Connection(folder, timeout)) as connection:
                status = connection.exchange(request, PagerStatus)
            break
        except (OSError, msgspec.MsgspecError) as failed:
            if not is_restoring(folder):  # the restore has just been completed
                return None
            if time.monotonic() > deadline:
                if _is_over(folder, failed):
                    (folder.path / SOCKET).unlink(missing_ok=True)  # so that the next caller does not wait
                    return None
                raise gone(folder, failed) from failed
        time.sleep(0.02)
    check(status)
    return status


def check(status: PagerStatus) -> None:
    """Raise the error in a reply, if any: RestoreError if the link to the source is lost, otherwise ImageError."""
    if status.error is not None:
        raise RestoreError(status.error) if status.paused is not None else ImageError(status.error)


def gone(folder: Folder, failed: Exception) -> RestoreError:
    """Return the error for a pager that does not respond."""
    return RestoreError(
        f"cannot reach the pager of {folder.name}: {failed}; some memory remains to be loaded from "
        f"{_next_pager(folder)} starts another pager"
    )


def _is_over(folder: Folder, failed: Exception) -> bool:
    """Return whether the pager was killed after it had completed its work. A pager removes its record first, then its
    socket."""
    recorded = any((folder.path / name).exists() for name in (RECORD, POSTCOPY))
    return isinstance(failed, ConnectionRefusedError) and not recorded


def status(folder: Folder) -> PagerStatus | None:
    """Return the progress of a restore, or None if none is in progress. Raises RestoreError."""
    return ask(folder, PagerRequest(what="status"))


def deferred_bits(folder: Folder) -> tuple[int, tuple[str, ImageIdentity] | None] | None:
    """Return the deferred bitmap of a workload, and the image with its deferred pages; None if no page is deferred.

    The bitmap is a descriptor, which the caller closes. The image is None if the contents are fetched from another
    host, or are in a cold store, whose pager loads them on demand only. Raises RestoreError.
    """
    record = folder.load(RECORD, Deferred)
    image = (record.image, record.identity) if record is not None and record.cold is None else None
    path = str(folder.path / FLAGS)
    if record is None and not (folder.path / POSTCOPY).exists():
        answer = status(folder)
        if answer is None or not answer.flags:
            return None
        image = (answer.image, answer.identity) if answer.identity is not None else None
        path = answer.flags
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC), image
    except FileNotFoundError:  # the restore has just been completed
        return None


def ensure(folder: Folder, region: int, first: int, count: int) -> None:
    """Load pages of a region, and return when they are present. Raises RestoreError, ImageError."""
    ask(folder, PagerRequest(what="ensure", region=region, first=first, count=count), None)


def wait_complete(folder: Folder) -> None:
    """Load all pages, and return when no userfaultfd covers the workload. Raises RestoreError, ImageError."""
    ask(folder, PagerRequest(what="settle"), None)


def _next_pager(folder: Folder) -> str:
    if (folder.path / POSTCOPY).exists():
        return f"the source of its migration; `pageferry receive --resume {folder.name}`"
    return f"an image; `pageferry restore --takeover {folder.name}`"
