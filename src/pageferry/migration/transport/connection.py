"""Connections of a migration: the control connection, and page streams to the same address.

With TLS, both sides present certificates. Without it, the kernel reports the user of a peer process on the same host
(`peer_users`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from logging import getLogger
from types import TracebackType
from typing import Self

from pageferry._engine import TlsSession
from pageferry.errors import AuthenticationError, ConnectionLost, PageferryError, ProtocolError
from pageferry.migration.transport import messages, peer_users, tls
from pageferry.migration.transport.addresses import Address
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.messages import AnyMessage
from pageferry.migration.transport.sockets import MAX_GREETINGS, Listener, connect, widen
from pageferry.migration.transport.tls import Trust

log = getLogger(__name__)

INDEX_BYTES = 4
MAGIC_BYTES = len(messages.CONTROL_MAGIC)
GREETING_BYTES = messages.TOKEN_BYTES + INDEX_BYTES
"""Length of the greeting of a page stream, bytes: token and stream number, after the magic."""
LINGER = 1.0
"""Seconds for which a rejected peer can read the reason before the connection is closed."""
RETRY = 0.1
"""Seconds between attempts to accept connections after a failure."""
GREETING = 5.0
"""Seconds within which a connection has to identify its kind."""
ACCEPTING = (0.0003, 0.005)
"""First and longest interval in seconds at which to check whether the peer has accepted a connection."""
MAX_WAITING = 8
"""Maximum number of sources queued for the receiver; further ones are rejected."""


@dataclass(frozen=True, slots=True)
class PageStream:
    """Connected, blocking socket for the engine, with its TLS session if there is one."""

    connection: socket.socket
    session: TlsSession | None = None

    @property
    def handle(self) -> int | tuple[int, TlsSession]:
        """Descriptor for the engine, which duplicates it, with the TLS session if there is one."""
        number = self.connection.fileno()
        return number if self.session is None else (number, self.session)

    def close(self) -> None:
        """Close the socket."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def connect_control(
    address: Address, timeout: float, trust: Trust | None = None, owners: Collection[int] | None = None
) -> Channel:
    """Open a control connection to a receiver, at the first address of the host that accepts it.

    `owners`: users other than root that the receiver may run as (default: our user); ignored with `trust`. Raises
    ConnectionLost, AuthenticationError.
    """
    owners = peer_users.owners_of() if owners is None else owners
    connection, address = await connect(address, timeout)
    if trust is None:
        await _authenticate(connection, owners, timeout)
        reader, writer = await _streams(connection)
        writer.write(messages.CONTROL_MAGIC)
        return Channel(reader, writer, timeout, address=address, owners=owners)
    session = trust.control_session(address.name)
    await _shake_hands(connection, session, messages.SECURE_CONTROL_MAGIC, address, timeout)
    stream = tls.SecureStream(session, *await _streams(connection))
    stream.write(messages.CONTROL_MAGIC)
    return Channel(stream, stream, timeout, session.peer(), address=address)


async def _authenticate(connection: socket.socket, owners: Collection[int], timeout: float) -> None:
    """Check the user of the process that accepts a connection on this host. Raises AuthenticationError, ConnectionLost.

    The peer's socket belongs to a process only once the connection is accepted, so the check is repeated until then.
    """
    interval, longest = ACCEPTING
    try:
        async with asyncio.timeout(timeout):
            while not peer_users.check_peer(connection, owners):  # the kernel sends no event for it
                await asyncio.sleep(interval)
                interval = min(2 * interval, longest)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError | TimeoutError):
            raise ConnectionLost(
                f"cannot connect to the receiver: it does not accept connections ({str(error) or 'timed out'})"
            ) from error
        raise


async def connect_stream(control: Channel, address: Address, token: bytes, index: int) -> PageStream:
    """Open a page stream to the same receiver as `control`. Raises ConnectionLost, AuthenticationError."""
    connection, address = await connect(control.address or address, control.timeout)
    greeting = messages.STREAM_MAGIC + token + index.to_bytes(INDEX_BYTES, "big")
    session = None if control.peer is None else control.peer.page_session()
    if session is None:
        await _authenticate(connection, control.owners, control.timeout)
    else:
        await _shake_hands(connection, session, messages.SECURE_STREAM_MAGIC, address, control.timeout)
        session.write(greeting)
        greeting = session.outgoing()
    try:
        async with asyncio.timeout(control.timeout):
            await asyncio.get_running_loop().sock_sendall(connection, greeting)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError | TimeoutError):
            raise ConnectionLost(f"cannot open a page stream to {address}: {str(error) or 'timed out'}") from error
        raise
    connection.setblocking(True)
    widen(connection)
    return PageStream(connection, session)


async def _shake_hands(
    connection: socket.socket, session: tls.Session, magic: bytes, address: Address, timeout: float
) -> None:
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().sock_sendall(connection, magic)
            await tls.shake_hands(connection, session)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError | EOFError | TimeoutError):
            reason = "timed out" if isinstance(error, TimeoutError) else str(error) or "it closed the connection"
            raise ConnectionLost(
                f"cannot establish a TLS connection to {address}: {reason}; start `pageferry receive --tls` there"
            ) from error
        raise


async def connect_streams(control: Channel, address: Address, token: bytes, numbers: Sequence[int]) -> list[PageStream]:
    """Open page streams with these numbers, in order. Raises the same errors as `connect_stream`, and PeerRefused with
    the reason that the receiver sends on `control`. After an error, all streams are closed."""

    async def connect_all() -> list[PageStream]:
        with contextlib.ExitStack() as opened:
            streams = [opened.enter_context(await connect_stream(control, address, token, index)) for index in numbers]
            opened.pop_all()
            return streams

    return await control.during(connect_all())


class ConnectionListener:
    """Listener of a receiver: accepts control connections and page streams, which it distinguishes by their magic.

    Each connection is greeted by a separate task, so that a silent one does not delay others. A connection without a
    valid greeting within `GREETING` seconds is closed. `timeout`: timeout of the control connections, seconds. With
    `trust`, only TLS connections are accepted, and without it only unencrypted ones.
    """

    def __init__(self, address: Address, timeout: float = 30.0, trust: Trust | None = None) -> None:
        self._timeout = timeout
        self._trust = trust
        self._owners = peer_users.owners_of()
        self._listener = Listener(address)
        self.address = self._listener.address
        """Address on which the receiver listens, with the port that the kernel has chosen if the port was 0."""
        self._controls: asyncio.Queue[tuple[Channel, AnyMessage]] = asyncio.Queue(MAX_WAITING)
        self._expected: dict[bytes, _Expected] = {}
        self._greeters: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._accept())

    async def control(self) -> tuple[Channel, AnyMessage]:
        """Return the next control connection with its first message."""
        return await self._controls.get()

    def expect(self, token: bytes, control: Channel) -> None:
        """Keep page streams that begin with this token, for `streams`. If `control` uses TLS, keep only streams that
        present the certificate of the peer of `control`."""
        certificate = None if control.peer is None else control.peer.certificate
        self._expected[token] = _Expected(asyncio.Queue(), certificate)

    async def streams(self, token: bytes, count: int, timeout: float) -> list[PageStream]:
        """Return all page streams that begin with the token, ordered by number. The token is invalid afterwards.

        Raises ConnectionLost if a stream is not connected within `timeout` seconds, ProtocolError for a duplicate or
        invalid number.
        """
        found: dict[int, PageStream] = {}
        try:
            async with asyncio.timeout(timeout):
                while len(found) < count:
                    index, stream = await self._expected[token].queue.get()
                    if index >= count or index in found:
                        stream.close()
                        raise ProtocolError(
                            f"invalid page stream number {index} of {count}: out of range, or used twice"
                        )
                    stream.connection.setblocking(True)
                    found[index] = stream
        except BaseException as error:
            for stream in found.values():
                stream.close()
            if isinstance(error, TimeoutError):
                raise ConnectionLost(
                    f"cannot open the page streams: only {len(found)} of {count} were connected within {timeout:g} s"
                ) from error
            raise
        finally:
            waiting = self._expected.pop(token).queue
            while not waiting.empty():
                waiting.get_nowait()[1].close()
        return [found[index] for index in range(count)]

    async def close(self) -> None:
        """Stop listening. Connections that `control` or `streams` has returned stay open."""
        for task in (self._task, *self._greeters):
            task.cancel()
        await asyncio.gather(self._task, *self._greeters, return_exceptions=True)
        self._listener.close()
        while not self._controls.empty():
            await self._controls.get_nowait()[0].close()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener.socket)
            except OSError as error:  # no free descriptor, or the peer has closed the connection
                log.warning("cannot accept a connection: %s", error)
                await asyncio.sleep(RETRY)
                continue
            connection.setblocking(False)
            if len(self._greeters) >= MAX_GREETINGS:
                connection.close()
                continue
            task = asyncio.create_task(self._greet(connection))
            self._greeters.add(task)
            task.add_done_callback(self._greeters.discard)

    async def _greet(self, connection: socket.socket) -> None:
        kept = False
        # The check precedes reading: once the peer has closed its socket, its user cannot be determined.
        refusal = self._refusal(connection) if self._trust is None else None
        try:
            async with asyncio.timeout(GREETING):
                magic = await _read_exactly(connection, MAGIC_BYTES)
                if refusal is None:
                    kept = await self._greet_known(connection, magic)
                elif magic == messages.CONTROL_MAGIC:
                    await self._refuse(Channel(*await _streams(connection), self._timeout), refusal)
        except AuthenticationError as error:
            log.warning("a source was refused: %s", error)
            await _linger(connection)
        except (OSError, EOFError, TimeoutError):
            pass  # not a peer of a migration
        finally:
            if not kept:
                connection.close()

    async def _greet_known(self, connection: socket.socket, magic: bytes) -> bool:
        """Greet a connection. Return whether it is a page stream that is kept; the channel of a control
        connection has its own descriptor."""
        trust = self._trust
        if magic == messages.CONTROL_MAGIC and trust is None:
            await self._greet_source(Channel(*await _streams(connection), self._timeout))
        elif magic == messages.SECURE_CONTROL_MAGIC and trust is not None:
            await self._greet_secure_source(connection, trust)
        elif magic in (messages.CONTROL_MAGIC, messages.SECURE_CONTROL_MAGIC):
            await self._refuse_plainly(connection)
        elif magic == messages.STREAM_MAGIC and trust is None:
            return self._keep(await _read_exactly(connection, GREETING_BYTES), PageStream(connection))
        elif magic == messages.SECURE_STREAM_MAGIC and trust is not None and self._expected:
            return await self._greet_secure_stream(connection, trust)
        return False

    def _refusal(self, connection: socket.socket) -> AuthenticationError | None:
        """Return the error for a peer that, without a certificate, is not permitted to hand over a workload; otherwise
        None."""
        try:
            known = peer_users.check_peer(connection, self._owners)
        except AuthenticationError as error:
            return error
        except ConnectionResetError:
            known = False
        return None if known else AuthenticationError("the peer has closed the connection")

    def _keep(self, greeting: bytes, stream: PageStream) -> bool:
        """Keep a page stream if its token and certificate are expected. Return whether it is kept."""
        expected = self._expected.get(greeting[: messages.TOKEN_BYTES])
        shown = None if stream.session is None else stream.session.peer_certificate
        if expected is None or expected.certificate != shown:
            return False
        expected.queue.put_nowait((int.from_bytes(greeting[messages.TOKEN_BYTES :], "big"), stream))
        return True

    async def _greet_secure_stream(self, connection: socket.socket, trust: Trust) -> bool:
        """Accept a page stream whose peer presents the certificate of a control connection with an expected token."""
        accepted = {each.certificate for each in self._expected.values() if each.certificate is not None}
        session = trust.identity.accept(list(accepted))
        await tls.shake_hands(connection, session)
        while (greeting := session.read(MAGIC_BYTES + GREETING_BYTES)) is None:
            received = await asyncio.get_running_loop().sock_recv(connection, tls.CHUNK)
            if not received:
                raise EOFError
            await tls.feed(connection, session, received)
        magic, greeting = greeting[:MAGIC_BYTES], greeting[MAGIC_BYTES:]
        return magic == messages.STREAM_MAGIC and self._keep(greeting, PageStream(connection, session))

    async def _greet_secure_source(self, connection: socket.socket, trust: Trust) -> None:
        session = trust.control_session()
        await tls.shake_hands(connection, session)
        stream = tls.SecureStream(session, *await _streams(connection))
        try:
            if await stream.readexactly(MAGIC_BYTES) != messages.CONTROL_MAGIC:
                raise EOFError
        except BaseException:
            stream.close()
            raise
        peer = session.peer()
        channel = Channel(stream, stream, self._timeout, peer)
        try:
            trust.authorize(peer)
        except AuthenticationError as error:
            await self._refuse(channel, error)
            return
        await self._greet_source(channel)

    async def _refuse_plainly(self, connection: socket.socket) -> None:
        """Refuse a connection if only one side uses TLS. The refusal is sent unencrypted; a peer that uses TLS reports
        that the receiver does not."""
        channel = Channel(*await _streams(connection), self._timeout)
        if self._trust is None:
            reason = "this receiver does not use TLS: start it with `tls` DIR, or migrate without `tls`"
        else:
            reason = "this receiver requires TLS: migrate with `tls` DIR"
        await self._refuse(channel, AuthenticationError(reason))

    async def _refuse(self, channel: Channel, error: AuthenticationError) -> None:
        log.warning("a source was refused: %s", error)
        channel.limit = messages.MAX_FIRST
        await channel.abort(str(error))
        with contextlib.suppress(PageferryError):  # closing with unread input would discard the reason
            await channel.during(asyncio.sleep(LINGER))
        await channel.close()

    async def _greet_source(self, channel: Channel) -> None:
        channel.limit = messages.MAX_FIRST
        try:
            first = await channel.receive_any()
            self._controls.put_nowait((channel, first))
        except BaseException as error:
            reason = (
                "too many sources wait for this receiver: retry later"
                if isinstance(error, asyncio.QueueFull)
                else str(error)
            )
            await channel.abort(reason)
            await channel.close()
            if isinstance(error, PageferryError | asyncio.QueueFull):
                log.warning("a source was refused: %s", reason)
                return
            raise


@dataclass(frozen=True, slots=True)
class _Expected:
    """Page streams expected with a token."""

    queue: asyncio.Queue[tuple[int, PageStream]]
    certificate: bytes | None
    """Certificate that the streams must present; None without TLS."""


async def _streams(connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open asyncio streams on the socket, taking over its descriptor."""
    return await asyncio.open_connection(sock=socket.socket(fileno=connection.detach()))


async def _linger(connection: socket.socket) -> None:
    """Wait until the peer has read the reason: closing a socket with unread input resets the connection."""
    with contextlib.suppress(OSError, TimeoutError):
        connection.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LINGER):
            while await asyncio.get_running_loop().sock_recv(connection, tls.CHUNK):
                pass


async def _read_exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        chunk = await asyncio.get_running_loop().sock_recv(connection, count - len(received))
        if not chunk:
            raise EOFError
        received += chunk
    return received
