"""Messages of the control socket, and their framing. The docstring of the package shows the order of the messages."""

from __future__ import annotations

import array
import socket
from typing import Annotated, NoReturn

import msgspec
from msgspec import Meta

from pageferry import errors
from pageferry.errors import WorkloadError
from pageferry.workloads.handle import Handle

VERSION = 5
"""Version of the protocol; other versions are refused."""

MAX_MESSAGE = 4 << 20
"""Maximum size of a message, bytes."""
STATE_CHUNK = 1 << 20
"""Maximum number of bytes of state per message."""
MAX_STATE = 512 << 20
"""Maximum size of a state, bytes."""
MAX_REGIONS = 16
_LENGTH_BYTES = 4

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base class of all messages. Unknown fields are refused."""


class Describe(Message):
    """Request for the description of the arena."""

    version: Count = VERSION


class SegmentInfo(msgspec.Struct, forbid_unknown_fields=True):
    """Encoding of `memory.regions.Segment`."""

    pid: Count
    address: Count
    length: Count
    offset: Count


class RegionInfo(msgspec.Struct, forbid_unknown_fields=True):
    """Encoding of `memory.regions.Region`. The descriptors are sent with the message, in the order of the regions."""

    name: str
    length: Count
    file_offset: Count
    page_size: Count
    segments: list[SegmentInfo]


class Description(Message):
    """Reply to Describe, sent with one descriptor per region."""

    version: Count
    pid: Count
    kind: str
    name: str
    details: dict[str, str | int | bool]
    regions: Annotated[list[RegionInfo], Meta(max_length=MAX_REGIONS)]
    direct_io: bool = True
    """Whether direct I/O into the memory is possible, and Pause waits for it."""
    handed_out: bool = True
    """See `Migratable.handed_out`."""


class CheckMappers(Message):
    """Request to check that only processes in the Description can write to the memory. The reply is Refused if another
    process can."""


class Pause(Message):
    """Request to stop all writes to the memory."""


class Resume(Message):
    """Request to resume the workload."""


class SaveState(Message):
    """Request for the state that is needed in addition to the memory."""


class LoadState(Message):
    """Chunk of the state to be loaded; `last` marks the last one."""

    data: Annotated[bytes, Meta(max_length=STATE_CHUNK)]
    last: bool


class StateReply(Message):
    """Chunk of the saved state; `last` marks the last one."""

    data: Annotated[bytes, Meta(max_length=STATE_CHUNK)]
    last: bool


class Commit(Message):
    """Notice that the workload may be running at the destination from now on."""


class Discard(Message):
    """Notice that the workload runs at the destination, and must be discarded at the source."""


class GetStatus(Message):
    """Request for the status."""


class StatusReply(Message):
    """Reply to GetStatus: a `lifecycle.Status`."""

    status: str


class GetFaults(Message):
    """Request for the page-fault counts of the workload's threads."""


class FaultsReply(Message):
    """Reply to GetFaults: encoding of `workloads.protocols.Faults`."""

    minor: Count
    major: Count


class GetReport(Message):
    """Request for data that the workload reports about itself."""


class ReportReply(Message):
    """Reply to GetReport. The contents depend on the kind of workload."""

    report: dict[str, object]


class Attach(Message):
    """Request from a process that will map the memory and write to it."""


class HandleReply(Message):
    """Reply to Attach: encoding of `handles.Handle`."""

    handle: Handle


class Done(Message):
    """Reply to a request that was carried out."""


class Refused(Message):
    """Reply to a request that failed without any change. `error`: name of a class of `pageferry.errors`."""

    error: str
    reason: str


Request = (
    Describe
    | CheckMappers
    | Pause
    | Resume
    | SaveState
    | LoadState
    | Commit
    | Discard
    | GetStatus
    | GetFaults
    | GetReport
    | Attach
)
Reply = Description | Done | Refused | StateReply | StatusReply | FaultsReply | ReportReply | HandleReply

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def send(connection: socket.socket, message: Message, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message, and descriptors with its first byte. Raises ValueError if the message is too long. Also
    raises OSError."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"cannot send {type(message).__name__} of {len(body)} bytes: the limit is {MAX_MESSAGE}")
    length = len(body).to_bytes(_LENGTH_BYTES, "big")
    if descriptors:
        rights = array.array("i", descriptors)
        connection.sendmsg([length], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        connection.sendall(body)
    else:
        connection.sendall(length + body)


def receive_request(connection: socket.socket) -> Request | None:
    """Return the next request; None if the client has disconnected. Raises MsgspecError or ValueError for an invalid
    request."""
    length = _exactly(connection, _LENGTH_BYTES)
    body = None if length is None else _exactly(connection, _bounded(length))
    return None if body is None else _requests.decode(body)


def receive_reply(connection: socket.socket, most: int = 0) -> tuple[Reply, list[int]]:
    """Return the next reply, and up to `most` descriptors received with it, which the caller closes.

    Raises EOFError if the peer has disconnected, msgspec.MsgspecError or ValueError for an invalid reply.
    """
    if most:
        length, descriptors, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, most)
    else:
        length, descriptors = connection.recv(_LENGTH_BYTES), []
    try:
        rest = _exactly(connection, _LENGTH_BYTES - len(length)) if length else None
        body = None if rest is None else _exactly(connection, _bounded(length + rest))
        if body is None:
            raise EOFError("cannot read from the control socket: the peer has closed it")
        return _replies.decode(body), descriptors
    except BaseException:
        close_all(descriptors)
        raise


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that were received with a message."""
    for descriptor in descriptors:
        socket.close(descriptor)


def refusal(error: Exception) -> Refused:
    """Return the reply for an exception."""
    return Refused(error=type(error).__name__, reason=str(error) or type(error).__name__)


def raise_refusal(refused: Refused) -> NoReturn:
    """Raise the exception that a reply describes. Raises WorkloadError if the named class is not derived from
    WorkloadError."""
    kind = getattr(errors, refused.error, None)
    if isinstance(kind, type) and issubclass(kind, WorkloadError):
        raise kind(refused.reason)
    raise WorkloadError(f"{refused.error}: {refused.reason}")


def pieces(state: bytes) -> list[tuple[bytes, bool]]:
    """Split a state into chunks for `StateReply` and `LoadState`. Return at least one, as
    (data, whether it is the last).

    Raises WorkloadError if the state is larger than MAX_STATE.
    """
    if len(state) > MAX_STATE:
        raise WorkloadError(f"cannot send a state of {len(state)} bytes: the limit is {MAX_STATE}; put it in the arena")
    starts = range(0, len(state), STATE_CHUNK) or range(1)
    return [(state[start : start + STATE_CHUNK], start + STATE_CHUNK >= len(state)) for start in starts]


def _bounded(length: bytes | bytearray) -> int:
    bytes_ahead = int.from_bytes(length, "big")
    if bytes_ahead > MAX_MESSAGE:
        raise ValueError(f"cannot receive a message of {bytes_ahead} bytes: the limit is {MAX_MESSAGE}")
    return bytes_ahead


def _exactly(connection: socket.socket, count: int) -> bytearray | None:
    """Return `count` bytes; None if the peer disconnects first."""
    data = bytearray(count)
    rest = memoryview(data)
    while rest:
        got = connection.recv_into(rest)
        if not got:
            return None
        rest = rest[got:]
    return data
