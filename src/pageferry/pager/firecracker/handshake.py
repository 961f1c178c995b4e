"""Handshake of Firecracker with its page fault handler: one message over a Unix stream socket.

Firecracker connects when it loads a snapshot, and sends a JSON array of the memory it has mapped, without a length, and
its userfaultfd as ancillary data. It expects no reply::

    [{"base_host_virt_addr": 140183892656128, "size": 134217728, "offset": 0,
      "page_size": 4096, "page_size_kib": 4096}]

`offset` is the position in the memory file of the snapshot. Versions differ in the fields: those before 1.7 have no
page size, which is then 4096; 1.7 to 1.11 have `page_size_kib`, whose value is in bytes in spite of its name; later
versions have `page_size`. A part of the message may arrive first, and with it or later up to three descriptors.

Everything that the message states is checked before memory is allocated for it.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pageferry.errors import RestoreError
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE

MAX_MESSAGE = 256 << 10
"""Maximum length of the message, bytes."""
MAX_MAPPINGS = 256
"""Maximum number of mappings. Firecracker has one or two, and a few more with hotplugged memory."""
MAX_DESCRIPTORS = 3
"""Maximum number of descriptors."""
TIMEOUT = 10.0
"""Maximum time from the connection to the end of the message, seconds."""
_CHUNK = 16 << 10
_USERFAULTFD = "anon_inode:[userfaultfd]"
_ADDRESSES = 1 << 56
"""End of the addresses that a process can have."""

_Address = Annotated[int, Meta(ge=0, lt=_ADDRESSES)]


class GuestMapping(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of the microVM that Firecracker has mapped. Unknown fields are ignored."""

    base_host_virt_addr: _Address
    """Address in the process of Firecracker."""
    size: Annotated[int, Meta(gt=0, lt=_ADDRESSES)]
    """Length, bytes."""
    offset: _Address
    """Position in the memory file, bytes."""
    page_size: int | None = None
    """Page size, bytes."""
    page_size_kib: int | None = None
    """Page size, bytes, in versions without `page_size`."""
    is_guest_memfd: bool = False
    """Whether the memory is a guest_memfd, for which the protocol is a different one."""

    @property
    def stated_page_size(self) -> int:
        """Page size, bytes: 4096 if the message has none."""
        for stated in (self.page_size, self.page_size_kib):
            if stated is not None:
                return stated
        return SMALL_PAGE

    @property
    def end(self) -> int:
        """Address after the end."""
        return self.base_host_virt_addr + self.size


@dataclass(frozen=True, slots=True)
class Layout:
    """Checked description of the memory of a microVM."""

    mappings: tuple[GuestMapping, ...]
    page_size: int
    """Page size of all mappings, bytes."""

    @property
    def length(self) -> int:
        """Size of the memory, bytes."""
        return sum(mapping.size for mapping in self.mappings)


_decoder = msgspec.json.Decoder(list[GuestMapping])


class InvalidHandshake(RestoreError):
    """The handshake is invalid or not supported."""


class Incomplete(InvalidHandshake):
    """The message is not complete yet."""


def parse(message: bytes | bytearray) -> Layout:
    """Parse and check a message. Raises Incomplete if the message is truncated, InvalidHandshake if it is invalid."""
    try:
        mappings = _decoder.decode(message)
    except msgspec.ValidationError as error:
        raise InvalidHandshake(f"invalid memory mappings: {error}") from error
    except msgspec.DecodeError as error:
        if "truncated" in str(error):
            raise Incomplete("the message is incomplete") from error
        raise InvalidHandshake(f"invalid memory mappings: {error}") from error
    except (RecursionError, UnicodeDecodeError) as error:
        raise InvalidHandshake("invalid memory mappings: not a JSON array of mappings") from error
    return check(mappings)


def check(mappings: Sequence[GuestMapping]) -> Layout:
    """Check that mappings are those of the whole memory of a microVM. Raises InvalidHandshake."""
    if not 0 < len(mappings) <= MAX_MAPPINGS:
        raise InvalidHandshake(f"invalid memory mappings: there are {len(mappings)}, expected 1 to {MAX_MAPPINGS}")
    sizes = {mapping.stated_page_size for mapping in mappings}
    page_size = sizes.pop()
    if sizes or page_size not in (SMALL_PAGE, LARGE_PAGE):
        found = ", ".join(str(size) for size in sorted({page_size, *sizes}))
        raise InvalidHandshake(f"unsupported page size {found}: expected {SMALL_PAGE} or {LARGE_PAGE} for all memory")
    for mapping in mappings:
        _check_one(mapping, page_size)
    _check_ranges("address", sorted((mapping.base_host_virt_addr, mapping.end) for mapping in mappings))
    ranges = sorted((mapping.offset, mapping.offset + mapping.size) for mapping in mappings)
    _check_ranges("offset", ranges)
    at = 0
    for start, end in ranges:
        if start != at:
            raise InvalidHandshake(f"invalid memory mappings: no mapping of offset {at}, the next one is at {start}")
        at = end
    return Layout(tuple(mappings), page_size)


def _check_one(mapping: GuestMapping, page_size: int) -> None:
    if mapping.is_guest_memfd:
        raise InvalidHandshake("unsupported memory: guest_memfd; use a microVM without secret hiding")
    for name, value in (
        ("base_host_virt_addr", mapping.base_host_virt_addr),
        ("size", mapping.size),
        ("offset", mapping.offset),
    ):
        if value % page_size:
            raise InvalidHandshake(
                f"invalid memory mapping: {name} {value} is not a multiple of the page size {page_size}"
            )
    if mapping.end > _ADDRESSES:
        raise InvalidHandshake(
            f"invalid memory mapping: {mapping.size} bytes at address {mapping.base_host_virt_addr:#x}"
        )


def _check_ranges(what: str, ranges: Sequence[tuple[int, int]]) -> None:
    for (_, end), (start, _) in itertools.pairwise(ranges):
        if start < end:
            raise InvalidHandshake(f"invalid memory mappings: two of them contain {what} {start}")


class Handshake:
    """Received message, and the userfaultfd that came with it. `close` closes the descriptor."""

    def __init__(self, layout: Layout, userfault: int) -> None:
        self.layout = layout
        self.userfault = userfault

    def close(self) -> None:
        """Close the userfaultfd. May be called twice."""
        descriptor, self.userfault = self.userfault, -1
        if descriptor >= 0:
            os.close(descriptor)


class Receiver:
    """Receiver of one handshake. After an error, `has_userfault` states whether the peer has sent its userfaultfd, and
    therefore waits for its memory."""

    def __init__(self, connection: socket.socket) -> None:
        self.has_userfault = False
        self._connection = connection
        self._message = bytearray()
        self._descriptors: list[int] = []

    async def receive(self) -> Handshake:
        """Receive the handshake. The connection must be non-blocking. Raises InvalidHandshake, OSError."""
        try:
            async with asyncio.timeout(TIMEOUT):
                layout = await self._receive_layout()
            return Handshake(layout, self._take_userfault())
        except TimeoutError:
            raise InvalidHandshake(
                f"the handshake is incomplete after {TIMEOUT:.0f} s: {len(self._message)} bytes, "
                f"{len(self._descriptors)} descriptors"
            ) from None
        finally:
            self.has_userfault = self.has_userfault or any(map(is_userfault, self._descriptors))
            for descriptor in self._descriptors:
                os.close(descriptor)

    async def _receive_layout(self) -> Layout:
        layout = None
        while layout is None or not self._descriptors:
            if not await self._receive_part():
                raise InvalidHandshake(self._ended(layout))
            if len(self._message) > MAX_MESSAGE:
                raise InvalidHandshake(f"the handshake has more than {MAX_MESSAGE} bytes")
            with contextlib.suppress(Incomplete):
                layout = parse(self._message)
        return layout

    def _ended(self, layout: Layout | None) -> str:
        if layout is not None:
            return "the handshake has no descriptor: expected the userfaultfd"
        return f"the handshake ended after {len(self._message)} bytes, before the end of the memory mappings"

    async def _receive_part(self) -> bool:
        """Receive a part of the message. Return False at the end of the stream."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return self._receive_now()
            except BlockingIOError:
                readable = loop.create_future()
                loop.add_reader(self._connection, _set, readable)
                try:
                    await readable
                finally:
                    loop.remove_reader(self._connection)

    def _receive_now(self) -> bool:
        space = socket.CMSG_SPACE((MAX_DESCRIPTORS + 1) * array.array("i").itemsize)
        data, ancillary, flags, _ = self._connection.recvmsg(_CHUNK, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, contents in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(contents[: len(contents) - len(contents) % numbers.itemsize])
                self._descriptors += numbers
        if len(self._descriptors) > MAX_DESCRIPTORS:
            raise InvalidHandshake(f"the handshake has more than {MAX_DESCRIPTORS} descriptors")
        if flags & socket.MSG_CTRUNC:
            self.has_userfault = True  # probably: it was not received
            raise InvalidHandshake(
                "the descriptors of the handshake were not received: too many open files; raise the limit (ulimit -n)"
            )
        self._message += data
        return bool(data)

    def _take_userfault(self) -> int:
        """Return the userfaultfd, the first descriptor, and close the others."""
        first = self._descriptors[0]
        if not is_userfault(first):
            raise InvalidHandshake("the first descriptor of the handshake is not a userfaultfd")
        self.has_userfault = True
        os.set_blocking(first, False)
        del self._descriptors[0]
        return first


def is_userfault(descriptor: int) -> bool:
    """Return whether a descriptor of this process is a userfaultfd."""
    return os.readlink(f"/proc/self/fd/{descriptor}") == _USERFAULTFD


def _set(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_result(None)
