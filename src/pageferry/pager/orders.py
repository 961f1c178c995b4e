"""Orders of a command to the pager process that it starts, and the replies.

Each message is a length (8 bytes, little endian) and MessagePack, sent over a socket that the pager process inherits::

    command                 pager process
    Open ─────────────────▶                 open and verify the image, while QEMU starts
           ◀─────────────── Opened
    Serve ────────────────▶                 handle every access to deferred memory
           ◀─────────────── Serving
    Fill ─────────────────▶                 the workload runs: load in the background too
    Evict ────────────────▶                 (only for a cold store)
           ◀─────────────── Evicted

If an order fails, the reply is `Failed`. When the command closes the socket or exits, a process that serves a workload
continues as after Fill; any other process exits. If page faults cannot be handled, Serve fails, and `Load` loads all
contents before the workload runs::

    Load ─────────────────▶
           ◀─────────────── Loading, repeatedly, until `finished`
"""

from __future__ import annotations

import socket

import msgspec

from pageferry import errors
from pageferry.errors import PageferryError, RestoreError
from pageferry.images.metadata import ImageIdentity, Metadata
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.records import Deferred

_LENGTH = 8
_FAILURES = {"CannotHandleFaults": CannotHandleFaults}


class Order(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of the messages of a command."""


class Open(Order, frozen=True, kw_only=True):
    """Order to open an image."""

    path: str
    """Absolute path."""
    expected: ImageIdentity | None = None
    """Identity of the image that the restore began with; None for a new restore."""
    name: str
    """Name of the workload, for messages."""


class Serve(Order, frozen=True, kw_only=True):
    """Order to serve a workload from the open image."""

    registry: str
    """Run directory with the directory of the workload."""
    name: str
    work: Deferred
    taken_over: bool = False
    """Whether another pager has served the workload."""
    evicting: bool = False
    """Whether pages will be evicted."""


class Load(Order, frozen=True, kw_only=True):
    """Order to load all contents of the open image now."""

    work: Deferred


class Fill(Order, frozen=True, kw_only=True):
    """Order to load in the background too. It has no reply."""


class Evict(Order, frozen=True, kw_only=True):
    """Order to evict pages of a paused workload."""

    region: int
    pages: bytes
    """Packed page set."""


class EndEvictions(Order, frozen=True, kw_only=True):
    """Order to finish when all pages are loaded."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of the messages of a pager process."""


class Failed(Reply, frozen=True, kw_only=True):
    """Reply to an order that failed."""

    kind: str
    """Name of the error class."""
    message: str

    def error(self) -> PageferryError:
        """Return the error, to be raised in the command."""
        kind: object = _FAILURES.get(self.kind) or getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, PageferryError):
            return kind(self.message)
        return RestoreError(self.message)


class Opened(Reply, frozen=True, kw_only=True):
    """Reply to `Open`."""

    identity: ImageIdentity
    metadata: Metadata
    pages: int
    """Number of base pages of all regions."""
    state: bytes
    """Device state of the workload."""
    seconds: float
    """Time to open the image, seconds."""


class Serving(Reply, frozen=True, kw_only=True):
    """Reply to `Serve`: every access to deferred memory is handled from now on."""


class Loading(Reply, frozen=True, kw_only=True):
    """Reply to `Load`, sent several times a second."""

    deferred: int
    """Deferred memory, bytes."""
    prefetched: int
    """Number of pages loaded."""
    bytes_read: int
    """Number of bytes of storage blocks read."""
    finished: bool


class Evicted(Reply, frozen=True, kw_only=True):
    """Reply to `Evict` and `EndEvictions`."""

    pages: int
    """Number of pages: evicted pages in the reply to `Evict`, deferred pages in the reply to `EndEvictions`."""


AnyOrder = Open | Serve | Load | Fill | Evict | EndEvictions
AnyReply = Failed | Opened | Serving | Loading | Evicted

_orders = msgspec.msgpack.Decoder(AnyOrder)
_replies = msgspec.msgpack.Decoder(AnyReply)


def send(connection: socket.socket, message: AnyOrder | AnyReply) -> None:
    """Send a message. Raises OSError."""
    data = msgspec.msgpack.encode(message)
    connection.sendall(len(data).to_bytes(_LENGTH, "little") + data)


def receive_order(connection: socket.socket) -> AnyOrder | None:
    """Receive an order. Return None if the command has closed the connection."""
    data = _receive(connection)
    return _orders.decode(data) if data is not None else None


def receive_reply(connection: socket.socket) -> AnyReply | None:
    """Receive a reply. Return None if the process has exited."""
    data = _receive(connection)
    return _replies.decode(data) if data is not None else None


def _receive(connection: socket.socket) -> bytes | None:
    try:
        head = _exactly(connection, _LENGTH)
        return _exactly(connection, int.from_bytes(head, "little")) if head is not None else None
    except ConnectionResetError:  # the peer has exited with unread messages
        return None


def _exactly(connection: socket.socket, length: int) -> bytes | None:
    data = bytearray(length)
    view, at = memoryview(data), 0
    while at < length:
        count = connection.recv_into(view[at:])
        if count == 0:
            return None
        at += count
    return bytes(data)
