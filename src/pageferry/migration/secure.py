"""TLS over asyncio: handshakes on sockets, and the stream of a control connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Protocol

from pageferry.errors import AuthenticationError
from pageferry.migration.trust import ControlSession

PIECE = 1 << 14
"""Maximum number of bytes read from a peer at a time."""


class Session(Protocol):
    """Common interface of `ControlSession` and the engine's `TlsSession`."""

    def feed(self, received: bytes) -> None: ...
    def outgoing(self) -> bytes: ...
    @property
    def established(self) -> bool: ...


async def shake_hands(connection: socket.socket, session: Session) -> None:
    """Complete the handshake, after which both sides are authenticated. The caller limits the time.

    Raises AuthenticationError (reported to the peer by an alert), EOFError, OSError.
    """
    loop = asyncio.get_running_loop()
    await _flush(connection, session)
    while not session.established:
        received = await loop.sock_recv(connection, PIECE)
        if not received:
            raise EOFError
        await feed(connection, session, received)


async def feed(connection: socket.socket, session: Session, received: bytes) -> None:
    """Pass received bytes to a session and its output to the peer. Raises as `shake_hands`."""
    try:
        session.feed(received)
    except (AuthenticationError, PermissionError) as error:
        with contextlib.suppress(OSError):
            await _flush(connection, session)
        if isinstance(error, PermissionError):
            raise AuthenticationError(f"page stream: {error}") from error
        raise
    await _flush(connection, session)


async def _flush(connection: socket.socket, session: Session) -> None:
    if waiting := session.outgoing():
        await asyncio.get_running_loop().sock_sendall(connection, waiting)


class SecureStream:
    """Reader and writer of a control connection over TLS, with the interface of asyncio's streams."""

    def __init__(self, session: ControlSession, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._session = session
        self._reader = reader
        self._writer = writer
        self._opened = bytearray()

    async def readexactly(self, count: int) -> bytes:
        """See StreamReader. Raises AuthenticationError for invalid records and for alerts of the peer."""
        while len(self._opened) < count:
            try:
                if opened := self._session.read():
                    self._opened += opened
                    continue
            except EOFError:
                sealed = b""
            else:
                sealed = await self._reader.read(PIECE)
            if not sealed:
                raise asyncio.IncompleteReadError(bytes(self._opened), count)
            self._session.feed(sealed)
            self._flush()
        taken = bytes(self._opened[:count])
        del self._opened[:count]
        return taken

    def write(self, data: bytes) -> None:
        """See StreamWriter."""
        self._session.write(data)
        self._flush()

    async def drain(self) -> None:
        """See StreamWriter."""
        await self._writer.drain()

    def close(self) -> None:
        """See StreamWriter. Sends a close_notify alert first."""
        self._session.close()
        self._flush()
        self._writer.close()

    async def wait_closed(self) -> None:
        """See StreamWriter."""
        await self._writer.wait_closed()

    def _flush(self) -> None:
        if (waiting := self._session.outgoing()) and not self._writer.is_closing():
            self._writer.write(waiting)
