"""Client of a pager (S8).

A reader of memory that bypasses the page tables of its workload calls `ensure` first. A migration or a checkpoint
installs write traces on those page tables, and borrows the userfaultfd of the pager for that: see
`workloads.deferred_access`. A caller that needs exclusive use of the page tables calls `wait_complete`.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from pageferry.errors import ImageError, RestoreError
from pageferry.host.registry import Folder
from pageferry.images.metadata import ImageIdentity
from pageferry.pager.protocol import PagerRequest, PagerStatus
from pageferry.pager.records import FLAGS, POSTCOPY, RECORD, SOCKET, Deferred, is_restoring

_TIMEOUT = 5.0
"""Timeout of replies that do not wait for pages, seconds."""

HANDOVER = 1.0
"""Maximum time between the end of one pager and the start of the next, seconds."""

Reply = TypeVar("Reply", bound=msgspec.Struct)


def ask(folder: Folder, question: PagerRequest, timeout: float | None = _TIMEOUT) -> PagerStatus | None:
    """Send a request to the pager of a workload; return its reply, or None if no restore is in progress.

    Raises RestoreError if one is in progress and its pager does not respond, ImageError if the image cannot be read.
    """
    if not is_restoring(folder):
        return None
    deadline = time.monotonic() + HANDOVER
    while True:
        try:
            status = _ask_once(folder.path / SOCKET, question, timeout)
            break
        except (OSError, msgspec.MsgspecError) as failed:
            if not is_restoring(folder):  # completed just now
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
    """Raise the error in a reply, if there is one: RestoreError, ImageError."""
    if status.error is not None:
        raise RestoreError(status.error) if status.paused is not None else ImageError(status.error)


def gone(folder: Folder, failed: Exception) -> RestoreError:
    """Return the error for a pager that does not respond."""
    return RestoreError(
        f"the pager of {folder.name} does not answer ({failed}): its memory is still coming from "
        f"{_next_pager(folder)} starts another pager"
    )


def _is_over(folder: Folder, failed: Exception) -> bool:
    """Return whether a pager was killed after its work was complete: it removes its record first, then its socket."""
    recorded = any((folder.path / name).exists() for name in (RECORD, POSTCOPY))
    return isinstance(failed, ConnectionRefusedError) and not recorded


def status(folder: Folder) -> PagerStatus | None:
    """Return the progress of a restore, or None if none is in progress. Raises RestoreError."""
    return ask(folder, PagerRequest(what="status"))


def deferred_bits(folder: Folder) -> tuple[int, tuple[str, ImageIdentity] | None] | None:
    """Return the deferred bitmap of a workload, and the image with its deferred pages; None if no page is deferred.

    The bitmap is a descriptor, which the caller closes. The image is None for contents of another host, and for a cold
    store, whose pages are loaded on demand only. Raises RestoreError.
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
    except FileNotFoundError:  # completed just now
        return None


def ensure(folder: Folder, region: int, first: int, count: int) -> None:
    """Load pages of a region, and return when they are present. Raises RestoreError, ImageError."""
    ask(folder, PagerRequest(what="ensure", region=region, first=first, count=count), None)


def wait_complete(folder: Folder) -> None:
    """Load all pages, and return when no userfaultfd covers the workload. Raises RestoreError, ImageError."""
    ask(folder, PagerRequest(what="settle"), None)


def _next_pager(folder: Folder) -> str:
    if (folder.path / POSTCOPY).exists():
        return f"another host; `pageferry receive --resume {folder.name}`"
    return f"an image; `pageferry restore --takeover {folder.name}`"


def exchange(connection: socket.socket, replies: BinaryIO, request: PagerRequest, kind: type[Reply]) -> Reply:
    """Send a request over a connection to a pager, and return the reply. `replies`: the connection, as a file.

    Raises OSError, msgspec.MsgspecError.
    """
    connection.sendall(msgspec.json.encode(request) + b"\n")
    line = replies.readline()
    if not line:
        raise ConnectionResetError("the pager closed the connection")
    return msgspec.json.decode(line, type=kind)


def _ask_once(path: Path, request: PagerRequest, timeout: float | None) -> PagerStatus:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        with connection.makefile("rb") as replies:
            return exchange(connection, replies, request, PagerStatus)
