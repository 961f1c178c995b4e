"""Messages of Cloud Hypervisor's local migration, over a Unix stream socket.

::

    request   u16 command, 6 bytes (Start: u16 version of the protocol), u64 length of the payload
    reply     u16 status (1: done, 2: failed), 6 bytes, u64 length of the payload

All numbers are little-endian. The receiver of a request sends a reply to it. `MemoryFd` has a payload of 4 bytes, the
number of a memory slot, which is sent with the descriptor of the slot's file as ancillary data. The payloads of
`Config` and `State` are opaque, except for the list of memory slots (see `slots`).

Order of requests: Start, MemoryFd for each slot, Config, State, then Complete or, for a paused VM, CompletePaused. A
further connection begins with a u16 instead, its role: 2 for page faults.

Nothing is allocated for a length that exceeds its limit.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from enum import IntEnum

from pageferry.errors import PageferryError

HEADER = struct.Struct("<H6sQ")
"""Request or reply: command or status, further bytes, length of the payload."""
SLOT = struct.Struct("<I")
FAULT_ROLE = struct.pack("<H", 2)
"""First bytes of the connection for page faults."""
VERSIONS = (0,)
"""Supported versions of the protocol."""
MAX_CONFIG = 16 << 20
"""Maximum length of the payload of `Config`, bytes."""
MAX_STATE = 256 << 20
"""Maximum length of the payload of `State`, bytes."""
_MAX_DESCRIPTORS = 4


class Command(IntEnum):
    """Commands of requests."""

    START = 1
    CONFIG = 2
    STATE = 3
    MEMORY = 4
    COMPLETE = 5
    ABANDON = 6
    MEMORY_FD = 7
    COMPLETE_PAUSED = 8
    PAGE_FAULT = 9


class Status(IntEnum):
    """Results in replies."""

    OK = 1
    ERROR = 2


LIMITS = {Command.CONFIG: MAX_CONFIG, Command.STATE: MAX_STATE, Command.MEMORY_FD: SLOT.size}
"""Maximum length of the payload of a request, bytes; 0 for other commands."""


class InvalidMessage(PageferryError):
    """A message is invalid, incomplete or unexpected."""


class Closed(InvalidMessage):
    """The peer has closed the connection between two messages."""


class Refused(PageferryError):
    """The peer has replied to a request with an error."""


class Received:
    """Received request. `close` closes the descriptor."""

    def __init__(self, command: Command, payload: bytes, descriptor: int = -1) -> None:
        self.command = command
        self.payload = payload
        self.descriptor = descriptor
        """File of a memory slot (`MemoryFd`); -1 for other commands."""

    @property
    def slot(self) -> int:
        """Number of the memory slot of a `MemoryFd`."""
        number: int = SLOT.unpack(self.payload)[0]
        return number

    def take(self) -> int:
        """Return the descriptor, which the caller closes."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def close(self) -> None:
        """Close the descriptor unless it was taken. May be called twice."""
        if self.descriptor >= 0:
            os.close(self.take())


def parse_request(header: bytes) -> tuple[Command, bytes, int]:
    """Return the command, the further bytes and the length of the payload of a request. Raises InvalidMessage."""
    number, further, length = HEADER.unpack(header)
    try:
        command = Command(number)
    except ValueError:
        raise InvalidMessage(f"invalid request: unknown command {number}") from None
    if length > LIMITS.get(command, 0):
        raise InvalidMessage(f"invalid request: {command.name} with a payload of {length} bytes")
    if command is Command.MEMORY_FD and length != SLOT.size:
        raise InvalidMessage(f"invalid request: MEMORY_FD with a payload of {length} bytes, expected {SLOT.size}")
    return command, further, length


def check_version(further: bytes) -> None:
    """Raise InvalidMessage unless the version of the protocol in a `Start` is supported."""
    version = int.from_bytes(further[:2], "little")
    if version not in VERSIONS:
        raise InvalidMessage(f"unsupported version {version} of the migration protocol: expected {VERSIONS[-1]}")


class Channel:
    """Connection to Cloud Hypervisor. Its methods block; `cut` interrupts them. `close` closes the socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self.socket = connection

    # -- requests of this side

    def request(self, command: Command, payload: bytes = b"") -> None:
        """Send a request, and wait for its reply. Raises Refused, InvalidMessage, OSError."""
        self.socket.sendall(HEADER.pack(command, bytes(6), len(payload)))
        if payload:  # a peer that has received the last request may have replied and closed the connection
            self.socket.sendall(payload)
        self._check_reply(command)

    def send_memory(self, slot: int, file: int) -> None:
        """Send the file of a memory slot, and wait for the reply. Raises the errors of `request`."""
        self.socket.sendall(HEADER.pack(Command.MEMORY_FD, bytes(6), SLOT.size))
        # A separate message: the peer receives the descriptor together with the number of the slot.
        socket.send_fds(self.socket, [SLOT.pack(slot)], [file])
        self._check_reply(Command.MEMORY_FD)

    def _check_reply(self, command: Command) -> None:
        status, _, length = HEADER.unpack(self._receive(HEADER.size, f"the reply to {command.name}"))
        if status == Status.ERROR:
            raise Refused(f"it has replied to {command.name} with an error")
        if status != Status.OK or length:
            raise InvalidMessage(f"invalid reply to {command.name}: status {status}, payload of {length} bytes")

    # -- requests of the peer

    def receive(self) -> Received:
        """Receive a request with its payload. Raises Closed at the end of the stream, InvalidMessage, OSError."""
        command, further, length = parse_request(self._receive(HEADER.size, "a request", first=True))
        if command is Command.START:
            check_version(further)
        if command is Command.MEMORY_FD:
            return self._receive_memory()
        return Received(command, self._receive(length, f"the payload of {command.name}"))

    def reply(self, status: Status = Status.OK) -> None:
        """Reply to a request. Raises OSError."""
        self.socket.sendall(HEADER.pack(status, bytes(6), 0))

    def _receive_memory(self) -> Received:
        descriptors: list[int] = []
        try:
            payload = self._receive_with(descriptors)
            if len(descriptors) != 1:
                raise InvalidMessage(f"invalid MEMORY_FD: it has {len(descriptors)} descriptors, expected 1")
            return Received(Command.MEMORY_FD, payload, descriptors.pop())
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _receive_with(self, descriptors: list[int]) -> bytes:
        """Receive the payload of a `MemoryFd`, and add the descriptors that come with it."""
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        payload = b""
        while len(payload) < SLOT.size:
            part, ancillary, flags, _ = self.socket.recvmsg(SLOT.size - len(payload), space, socket.MSG_CMSG_CLOEXEC)
            for level, kind, contents in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    numbers = array.array("i")
                    numbers.frombytes(contents[: len(contents) - len(contents) % numbers.itemsize])
                    descriptors += numbers
            if flags & socket.MSG_CTRUNC:
                raise InvalidMessage(
                    "the descriptors of MEMORY_FD were not received: too many, or too many open files (ulimit -n)"
                )
            if not part:
                raise InvalidMessage("the connection ended within the payload of MEMORY_FD")
            payload += part
        return payload

    # -- both

    def _receive(self, length: int, what: str, *, first: bool = False) -> bytes:
        contents = bytearray()
        while len(contents) < length:
            part = self.socket.recv(min(length - len(contents), 1 << 20))
            if not part and first and not contents:
                raise Closed("the connection was closed")
            if not part:
                raise InvalidMessage(f"the connection ended within {what}, after {len(contents)} of {length} bytes")
            contents += part
        return bytes(contents)

    def cut(self) -> None:
        """Shut the connection down, so that calls in other threads fail."""
        with contextlib.suppress(OSError):  # the peer has closed it
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. May be called twice."""
        self.socket.close()
