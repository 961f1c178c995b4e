"""Orders of a command to the pager process that it starts, and the replies.

Each message is a length (8 bytes, little endian) followed by MessagePack. The pager process inherits the socket::

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

For a guest that shares the memory of the image, the command sends these orders to the pager of the base, which it has
started or found running::

    OpenBase ─────────────▶                 create the base, or open the one that clones of an exited pager have
           ◀─────────────── BaseOpened      (BaseElsewhere: another pager serves the base)
    Share ────────────────▶                 QEMU has the descriptor of the base: replace its memory
           ◀─────────────── Shared
    GetBase ──────────────▶
           ◀─────────────── BaseState

A Python program maps the base itself, and sends these orders to the pager::

    Join ─────────────────▶                 serve the userfaultfd of the program; without one, load the base completely
           ◀─────────────── Joined
    Ensure ───────────────▶                 load a range of the base now
           ◀─────────────── Ensured
"""

from __future__ import annotations

import socket

import msgspec

from pageferry import errors
from pageferry.errors import PageferryError, RestoreError
from pageferry.images.metadata import ImageIdentity, Metadata
from pageferry.pager.base_protocol import BaseStatus
from pageferry.pager.base_records import CloneRecord
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.records import Deferred

_LENGTH = 8
_FAILURES = {"CannotHandleFaults": CannotHandleFaults}


class Order(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base class of the messages of a command."""


class Open(Order, frozen=True, kw_only=True):
    """Order to open an image."""

    path: str
    """Absolute path."""
    expected: ImageIdentity | None = None
    """Identity of the image that the restore began with; None for a new restore."""
    name: str
    """Name of the workload, for error messages."""


class Serve(Order, frozen=True, kw_only=True):
    """Order to serve a workload from the open image."""

    registry: str
    """Run directory with the directory of the workload."""
    name: str
    work: Deferred
    taken_over: bool = False
    """Whether another pager served the workload before."""
    evicting: bool = False
    """Whether pages will be evicted."""


class Load(Order, frozen=True, kw_only=True):
    """Order to load all contents of the open image now."""

    work: Deferred


class Fill(Order, frozen=True, kw_only=True):
    """Order to load contents in the background too. It has no reply."""


class Evict(Order, frozen=True, kw_only=True):
    """Order to evict pages of a paused workload."""

    region: int
    pages: bytes
    """Packed page set."""


class EndEvictions(Order, frozen=True, kw_only=True):
    """Order to finish when all pages are loaded."""


class OpenBase(Order, frozen=True, kw_only=True):
    """Order to serve the base of the open image."""

    registry: str
    """Run directory."""


class Share(Order, frozen=True, kw_only=True):
    """Order to replace the memory of a guest with a private mapping of the base, before the guest runs."""

    name: str
    work: CloneRecord


class Join(Order, frozen=True, kw_only=True):
    """Order to serve a program that maps the base, or will map it when it is complete."""

    name: str
    work: CloneRecord


class Ensure(Order, frozen=True, kw_only=True):
    """Order to load a range of the base (`offset` and `length` in bytes)."""

    offset: int
    length: int
    image: str
    """Path of the image, for error messages."""


class GetBase(Order, frozen=True, kw_only=True):
    """Order to return the state of the base."""


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base class of the messages of a pager process."""


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


class BaseOpened(Reply, frozen=True, kw_only=True):
    """Reply to `OpenBase`."""

    pager: int
    """Process id of the pager."""
    descriptor: int
    """Number of the descriptor of the base in that process."""
    device: int
    """Device of the file of the base, as in `os.stat_result.st_dev`."""
    inode: int
    identity: ImageIdentity
    """Identity of the image."""


class BaseElsewhere(Reply, frozen=True, kw_only=True):
    """Reply to `OpenBase` if another pager serves the base."""

    socket: str
    """Path of the socket for orders to that pager."""
    pager: int
    """Process id of that pager."""


class Shared(Reply, frozen=True, kw_only=True):
    """Reply to `Share`: the guest can access its memory from now on."""


class Joined(Reply, frozen=True, kw_only=True):
    """Reply to `Join`: accesses to the base may begin."""


class Ensured(Reply, frozen=True, kw_only=True):
    """Reply to `Ensure`: the range is in the base."""


class BaseState(Reply, frozen=True, kw_only=True):
    """Reply to `GetBase`."""

    status: BaseStatus


AnyOrder = Open | Serve | Load | Fill | Evict | EndEvictions | OpenBase | Share | Join | Ensure | GetBase
AnyReply = (
    Failed | Opened | Serving | Loading | Evicted | BaseOpened | BaseElsewhere | Shared | Joined | Ensured | BaseState
)

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
