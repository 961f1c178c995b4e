"""Messages of the control socket, and their framing. The package draws their order."""

from __future__ import annotations

import array
import socket
from typing import Annotated, NoReturn

import msgspec
from msgspec import Meta

from pageferry import errors
from pageferry.errors import WorkloadError

VERSION = 2
"""Of the protocol; another one is refused by name."""

MAX_MESSAGE = 4 << 20
"""Largest message, bytes."""
STATE_CHUNK = 1 << 20
"""Bytes of state per message."""
MAX_STATE = 512 << 20
"""Largest state, bytes."""
MAX_REGIONS = 16
_LENGTH_BYTES = 4

Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages; a field nobody knows is refused."""


class Describe(Message):
    """What are you?"""

    version: Count = VERSION


class SegmentInfo(msgspec.Struct, forbid_unknown_fields=True):
    """A `memory.regions.Segment`."""

    pid: Count
    address: Count
    length: Count
    offset: Count


class RegionInfo(msgspec.Struct, forbid_unknown_fields=True):
    """A `memory.regions.Region`; its descriptor comes with the message, in the same order."""

    name: str
    length: Count
    file_offset: Count
    page_size: Count
    segments: list[SegmentInfo]


class Description(Message):
    """This. One descriptor per region comes with it."""

    version: Count
    pid: Count
    kind: str
    name: str
    details: dict[str, str | int | bool]
    regions: Annotated[list[RegionInfo], Meta(max_length=MAX_REGIONS)]
    direct_io: bool = True
    """Whether direct I/O into the memory is possible, and Pause waits for it."""
    handed_out: bool = True
    """As `Workload.handed_out`."""


class CheckMappers(Message):
    """Which processes can write to the memory, other than those of the Description?"""


class Pause(Message):
    """Stop everything that writes to the memory."""


class Resume(Message):
    """Let it go on."""


class SaveState(Message):
    """What has to move besides the memory?"""


class LoadState(Message):
    """A piece of the state to be loaded; the last one is marked."""

    data: Annotated[bytes, Meta(max_length=STATE_CHUNK)]
    last: bool


class StateIs(Message):
    """A piece of the state; the last one is marked."""

    data: Annotated[bytes, Meta(max_length=STATE_CHUNK)]
    last: bool


class Commit(Message):
    """It may be running elsewhere from now on."""


class Discard(Message):
    """It runs elsewhere."""


class AskStatus(Message):
    """Do you run?"""


class StatusIs(Message):
    """A `lifecycle.Status`."""

    status: str


class AskFaults(Message):
    """How many page faults have your threads taken?"""


class FaultsAre(Message):
    """A `workloads.protocols.Faults`."""

    minor: Count
    major: Count


class AskReport(Message):
    """What have you to say about yourself?"""


class ReportIs(Message):
    """What a kind of workload chooses to tell."""

    report: dict[str, object]


class Done(Message):
    """It is done."""


class Refused(Message):
    """It is not done, and nothing has changed. `error` is the name of an error of `pageferry.errors`."""

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
    | AskStatus
    | AskFaults
    | AskReport
)
Answer = Description | Done | Refused | StateIs | StatusIs | FaultsAre | ReportIs

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_answers = msgspec.msgpack.Decoder(Answer)


def send(connection: socket.socket, message: Message, descriptors: tuple[int, ...] = ()) -> None:
    """Send one message, and descriptors with its first byte. Raises ValueError when it is too long, and OSError."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes, the limit is {MAX_MESSAGE}")
    length = len(body).to_bytes(_LENGTH_BYTES, "big")
    if descriptors:
        rights = array.array("i", descriptors)
        connection.sendmsg([length], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        connection.sendall(body)
    else:
        connection.sendall(length + body)


def receive_request(connection: socket.socket) -> Request | None:
    """The next request; None when the client is gone. Raises msgspec.MsgspecError or ValueError for anything else."""
    length = _exactly(connection, _LENGTH_BYTES)
    body = None if length is None else _exactly(connection, _bounded(length))
    return None if body is None else _requests.decode(body)


def receive_answer(connection: socket.socket, most: int = 0) -> tuple[Answer, list[int]]:
    """The next answer and up to `most` descriptors with it, which are the caller's to close.

    Raises EOFError when the other side is gone, msgspec.MsgspecError or ValueError for what is no answer.
    """
    if most:
        length, descriptors, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, most)
    else:
        length, descriptors = connection.recv(_LENGTH_BYTES), []
    try:
        rest = _exactly(connection, _LENGTH_BYTES - len(length)) if length else None
        body = None if rest is None else _exactly(connection, _bounded(length + rest))
        if body is None:
            raise EOFError("the control socket was closed")
        return _answers.decode(body), descriptors
    except BaseException:
        close_all(descriptors)
        raise


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that came with a message."""
    for descriptor in descriptors:
        socket.close(descriptor)


def refusal(error: Exception) -> Refused:
    """An exception as an answer."""
    return Refused(error=type(error).__name__, reason=str(error) or type(error).__name__)


def raise_refusal(refused: Refused) -> NoReturn:
    """The answer as an exception: of the class it names, where that is a WorkloadError, otherwise WorkloadError."""
    kind = getattr(errors, refused.error, None)
    if isinstance(kind, type) and issubclass(kind, WorkloadError):
        raise kind(refused.reason)
    raise WorkloadError(f"{refused.error}: {refused.reason}")


def pieces(state: bytes) -> list[tuple[bytes, bool]]:
    """State cut up for `StateIs` and `LoadState`: (data, whether it is the last); at least one piece.

    Raises WorkloadError for more than MAX_STATE.
    """
    if len(state) > MAX_STATE:
        raise WorkloadError(f"the state is {len(state)} bytes, the limit is {MAX_STATE}: put it in the arena")
    starts = range(0, len(state), STATE_CHUNK) or range(1)
    return [(state[start : start + STATE_CHUNK], start + STATE_CHUNK >= len(state)) for start in starts]


def _bounded(length: bytes | bytearray) -> int:
    bytes_ahead = int.from_bytes(length, "big")
    if bytes_ahead > MAX_MESSAGE:
        raise ValueError(f"a message of {bytes_ahead} bytes, the limit is {MAX_MESSAGE}")
    return bytes_ahead


def _exactly(connection: socket.socket, count: int) -> bytearray | None:
    """`count` bytes, or None when the other side went away first."""
    data = bytearray(count)
    rest = memoryview(data)
    while rest:
        got = connection.recv_into(rest)
        if not got:
            return None
        rest = rest[got:]
    return data
