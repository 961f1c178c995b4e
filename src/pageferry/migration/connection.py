"""Connections of a migration: the control connection, and page streams on the same port; in the clear or under TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from types import TracebackType
from typing import Self

from pageferry._engine import TlsSession
from pageferry.errors import AuthenticationError, ConnectionLost, PageferryError, ProtocolError, UsageError
from pageferry.migration import messages, secure
from pageferry.migration.channel import Channel
from pageferry.migration.messages import AnyMessage
from pageferry.migration.trust import Trust

log = getLogger(__name__)

INDEX_BYTES = 4
MAGIC_BYTES = len(messages.CONTROL_MAGIC)
GREETING_BYTES = messages.TOKEN_BYTES + INDEX_BYTES
"""Of a page stream, after the magic."""
LINGER = 1.0
"""Seconds for which a peer that was refused may go on sending before it must have read why."""
RETRY = 0.1
"""Seconds until the next try after a connection could not be accepted."""
GREETING = 5.0
"""Seconds that a connection has to say what it is."""
MAX_GREETINGS = 64
"""Connections that may be at it at once."""
MAX_WAITING = 8
"""Sources that may wait for the receiver to turn to them; others are closed."""
UNACKNOWLEDGED = 16 << 20
"""Bytes of a page stream that may be under way: enough for 1 Gbit/s over 100 ms, or 10 Gbit/s over 10 ms."""
UNSENT = 1 << 20
"""Bytes of a page stream that may wait in the kernel. More would only be taken for sent, and keep a slow link from
showing that it is alive."""
SO_SNDBUFFORCE = 32
"""Of socket(7); Python does not name it."""


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT, resolved."""

    host: str
    port: int
    name: str = ""
    """HOST as it was given."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PageStream:
    """A connected, blocking socket for the engine, and under TLS its session."""

    connection: socket.socket
    session: TlsSession | None = None

    @property
    def handle(self) -> int | tuple[int, TlsSession]:
        """As the engine takes it, which duplicates the descriptor."""
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


def resolve(text: str, *, insecure: bool, what: str, trust: Trust | None = None) -> Address:
    """The address of `HOST:PORT` or `[IPV6]:PORT`.

    Plain TCP is neither encrypted nor authenticated, so other addresses than loopback need `trust` or `insecure`.
    Raises UsageError.
    """
    if insecure and trust is not None:
        raise UsageError("either --tls or --insecure: with certificates nothing is sent in the clear")
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{what} {text!r}: give HOST:PORT, for example 127.0.0.1:7070")
    host = host.strip("[]") or "127.0.0.1"
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"{what} {text!r}: {error}") from error
    address = str(found[0][4][0])
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback and not insecure and trust is None:
        raise UsageError(
            f"{what} {text}: memory would cross the network in the clear, readable and forgeable by anybody on the "
            f"way; give certificates with --tls DIR, use a loopback address (through a tunnel), or --insecure where "
            f"the network is yours alone"
        )
    return Address(address, int(port), host)


def _tune(connection: socket.socket, patience: float) -> None:
    """Small messages go at once; a dead peer is noticed by the kernel too."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(patience * 1000))


def _widen(connection: socket.socket) -> None:
    """Let a long link be full: by itself the kernel stops at `net.ipv4.tcp_wmem`, 80 MB/s where it takes 50 ms."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
    with contextlib.suppress(PermissionError):  # needs CAP_NET_ADMIN; SO_SNDBUF would often make it smaller
        connection.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, UNACKNOWLEDGED)


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


async def _connect(address: Address, patience: float) -> socket.socket:
    connection = socket.socket(_family(address), socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(patience):
            await asyncio.get_running_loop().sock_connect(connection, (address.host, address.port))
        _tune(connection, patience)
    except (OSError, TimeoutError) as error:
        connection.close()
        raise ConnectionLost(
            f"nothing answers at the address {address} ({str(error) or 'timed out'}): run `pageferry receive` there"
        ) from error
    return connection


async def connect_control(address: Address, patience: float, trust: Trust | None = None) -> Channel:
    """A control connection to a receiver. Raises ConnectionLost, AuthenticationError."""
    connection = await _connect(address, patience)
    if trust is None:
        reader, writer = await asyncio.open_connection(sock=connection)
        writer.write(messages.CONTROL_MAGIC)
        return Channel(reader, writer, patience)
    session = trust.control_session(address.name)
    await _shake_hands(connection, session, messages.SECURE_CONTROL_MAGIC, address, patience)
    stream = secure.SecureStream(session, *await asyncio.open_connection(sock=connection))
    stream.write(messages.CONTROL_MAGIC)
    return Channel(stream, stream, patience, session.peer())


async def connect_stream(control: Channel, address: Address, token: bytes, index: int) -> PageStream:
    """A page stream to the receiver at the other end of `control`, and no other. Raises ConnectionLost,
    AuthenticationError."""
    connection = await _connect(address, control.patience)
    greeting = messages.STREAM_MAGIC + token + index.to_bytes(INDEX_BYTES, "big")
    session = None if control.peer is None else control.peer.page_session()
    if session is not None:
        await _shake_hands(connection, session, messages.SECURE_STREAM_MAGIC, address, control.patience)
        session.write(greeting)
        greeting = session.outgoing()
    try:
        async with asyncio.timeout(control.patience):
            await asyncio.get_running_loop().sock_sendall(connection, greeting)
    except (OSError, TimeoutError) as error:
        connection.close()
        raise ConnectionLost(f"page stream to {address}: {str(error) or 'timed out'}") from error
    connection.setblocking(True)
    _widen(connection)
    return PageStream(connection, session)


async def _shake_hands(
    connection: socket.socket, session: secure.Session, magic: bytes, address: Address, patience: float
) -> None:
    try:
        async with asyncio.timeout(patience):
            await asyncio.get_running_loop().sock_sendall(connection, magic)
            await secure.shake_hands(connection, session)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError | EOFError | TimeoutError):
            reason = "timed out" if isinstance(error, TimeoutError) else str(error) or "it closed the connection"
            raise ConnectionLost(
                f"no secure connection to {address} ({reason}): does `pageferry receive --tls` run there?"
            ) from error
        raise


async def connect_streams(control: Channel, address: Address, token: bytes, numbers: Sequence[int]) -> list[PageStream]:
    """Page streams of these numbers, in order. Raises as `connect_stream`; none is left open then."""
    with contextlib.ExitStack() as opened:
        streams = [opened.enter_context(await connect_stream(control, address, token, index)) for index in numbers]
        opened.pop_all()
        return streams


class Reception:
    """A listening socket that tells control connections and page streams apart by how they begin.

    Every connection is greeted by a task of its own, so that one that says nothing keeps nobody else waiting; what
    does not begin as it must within `GREETING` seconds is closed. `patience` is that of the control connections. With
    `trust` nothing is accepted in the clear, and without it nothing else.
    """

    def __init__(self, address: Address, patience: float = 30.0, trust: Trust | None = None) -> None:
        self._patience = patience
        self._trust = trust
        self._socket = _listen(address)
        host, port = self._socket.getsockname()[:2]
        self.address = Address(host, port)
        """Where it listens; the port is the one the kernel chose when 0 was asked for."""
        self._controls: asyncio.Queue[tuple[Channel, AnyMessage]] = asyncio.Queue(MAX_WAITING)
        self._expected: dict[bytes, _Expected] = {}
        self._greeters: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._accept())

    async def control(self) -> tuple[Channel, AnyMessage]:
        """The next control connection, and the first message that came over it."""
        return await self._controls.get()

    def expect(self, token: bytes, control: Channel) -> None:
        """From now on, page streams that begin with this token are kept for `streams`; only those of the peer at the
        other end of `control`, if that is secure."""
        certificate = None if control.peer is None else control.peer.certificate
        self._expected[token] = _Expected(asyncio.Queue(), certificate)

    async def streams(self, token: bytes, count: int, patience: float) -> list[PageStream]:
        """All page streams that begin with the token, in their order. The token is used up then.

        Raises ConnectionLost when they do not all come, ProtocolError for a number twice or out of range.
        """
        found: dict[int, PageStream] = {}
        try:
            async with asyncio.timeout(patience):
                while len(found) < count:
                    index, stream = await self._expected[token].queue.get()
                    if index >= count or index in found:
                        stream.close()
                        raise ProtocolError(f"page stream number {index} of {count}, or twice")
                    stream.connection.setblocking(True)
                    found[index] = stream
        except BaseException as error:
            for stream in found.values():
                stream.close()
            if isinstance(error, TimeoutError):
                raise ConnectionLost(f"{len(found)} of {count} page streams came within {patience:g} s") from error
            raise
        finally:
            waiting = self._expected.pop(token).queue
            while not waiting.empty():
                waiting.get_nowait()[1].close()
        return [found[index] for index in range(count)]

    async def close(self) -> None:
        """Stop listening; connections that were handed out live on."""
        for task in (self._task, *self._greeters):
            task.cancel()
        await asyncio.gather(self._task, *self._greeters, return_exceptions=True)
        self._socket.close()
        while not self._controls.empty():
            await self._controls.get_nowait()[0].close()

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            except OSError as error:  # no descriptors left, or the peer gave up already
                log.warning("a connection could not be accepted: %s", error)
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
        try:
            async with asyncio.timeout(GREETING):
                kept = await self._greet_known(connection, await _read_exactly(connection, MAGIC_BYTES))
        except AuthenticationError as error:
            log.warning("a source was refused: %s", error)
            await _linger(connection)
        except (OSError, EOFError, TimeoutError):
            pass  # nobody we know
        finally:
            if not kept:
                connection.close()

    async def _greet_known(self, connection: socket.socket, magic: bytes) -> bool:
        """Whether it is a page stream that is kept. (A control connection has a descriptor of its own then.)"""
        trust = self._trust
        if magic == messages.CONTROL_MAGIC and trust is None:
            await self._greet_source(Channel(*await _streams(connection), self._patience))
        elif magic == messages.SECURE_CONTROL_MAGIC and trust is not None:
            await self._greet_secure_source(connection, trust)
        elif magic in (messages.CONTROL_MAGIC, messages.SECURE_CONTROL_MAGIC):
            await self._refuse_plainly(connection)
        elif magic == messages.STREAM_MAGIC and trust is None:
            return self._keep(await _read_exactly(connection, GREETING_BYTES), PageStream(connection))
        elif magic == messages.SECURE_STREAM_MAGIC and trust is not None and self._expected:
            return await self._greet_secure_stream(connection, trust)
        return False

    def _keep(self, greeting: bytes, stream: PageStream) -> bool:
        """Keep a page stream for `streams`, if it is one that is expected."""
        expected = self._expected.get(greeting[: messages.TOKEN_BYTES])
        shown = None if stream.session is None else stream.session.peer_certificate
        if expected is None or expected.certificate != shown:
            return False
        expected.queue.put_nowait((int.from_bytes(greeting[messages.TOKEN_BYTES :], "big"), stream))
        return True

    async def _greet_secure_stream(self, connection: socket.socket, trust: Trust) -> bool:
        """Only from peers that have an authenticated control connection and were told a token over it."""
        accepted = {each.certificate for each in self._expected.values() if each.certificate is not None}
        session = trust.identity.accept(list(accepted))
        await secure.shake_hands(connection, session)
        while (greeting := session.read(MAGIC_BYTES + GREETING_BYTES)) is None:
            received = await asyncio.get_running_loop().sock_recv(connection, secure.PIECE)
            if not received:
                raise EOFError
            await secure.feed(connection, session, received)
        magic, greeting = greeting[:MAGIC_BYTES], greeting[MAGIC_BYTES:]
        return magic == messages.STREAM_MAGIC and self._keep(greeting, PageStream(connection, session))

    async def _greet_secure_source(self, connection: socket.socket, trust: Trust) -> None:
        session = trust.control_session()
        await secure.shake_hands(connection, session)
        stream = secure.SecureStream(session, *await _streams(connection))
        try:
            if await stream.readexactly(MAGIC_BYTES) != messages.CONTROL_MAGIC:
                raise EOFError
        except BaseException:
            stream.close()
            raise
        peer = session.peer()
        channel = Channel(stream, stream, self._patience, peer)
        try:
            trust.let_in(peer)
        except AuthenticationError as error:
            await self._refuse(channel, error)
            return
        await self._greet_source(channel)

    async def _refuse_plainly(self, connection: socket.socket) -> None:
        """One side speaks TLS, the other does not. In the clear: who speaks TLS takes it for what it is."""
        channel = Channel(*await _streams(connection), self._patience)
        if self._trust is None:
            reason = "this receiver does not speak TLS: start it with --tls DIR, or migrate without"
        else:
            reason = "this receiver accepts TLS only: migrate with --tls DIR"
        await self._refuse(channel, AuthenticationError(reason))

    async def _refuse(self, channel: Channel, error: AuthenticationError) -> None:
        log.warning("a source was refused: %s", error)
        await channel.abort(str(error))
        await channel.close()

    async def _greet_source(self, channel: Channel) -> None:
        channel.limit = messages.MAX_FIRST
        try:
            first = await channel.receive_any()
            self._controls.put_nowait((channel, first))
        except BaseException as error:
            reason = "too many sources wait here: try again" if isinstance(error, asyncio.QueueFull) else str(error)
            await channel.abort(reason)
            await channel.close()
            if isinstance(error, PageferryError | asyncio.QueueFull):
                log.warning("a source was refused: %s", reason)
                return
            raise


@dataclass(frozen=True, slots=True)
class _Expected:
    """Page streams with a token that was given to a source."""

    queue: asyncio.Queue[tuple[int, PageStream]]
    certificate: bytes | None
    """What they must show."""


async def _streams(connection: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Over the descriptor of the socket, which has none from then on."""
    return await asyncio.open_connection(sock=socket.socket(fileno=connection.detach()))


async def _linger(connection: socket.socket) -> None:
    """Let the peer read why: closing with something of it unread would take that away."""
    with contextlib.suppress(OSError, TimeoutError):
        connection.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LINGER):
            while await asyncio.get_running_loop().sock_recv(connection, secure.PIECE):
                pass


def _listen(address: Address) -> socket.socket:
    listener = socket.socket(_family(address), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setblocking(False)
    try:
        listener.bind((address.host, address.port))
        listener.listen(MAX_GREETINGS)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {address}: {error.strerror}") from error
    return listener


async def _read_exactly(connection: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        piece = await asyncio.get_running_loop().sock_recv(connection, count - len(received))
        if not piece:
            raise EOFError
        received += piece
    return received
