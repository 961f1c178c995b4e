"""Connections of a migration: the control connection, and page streams on the same port."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger

from pageferry.errors import ConnectionLost, PageferryError, ProtocolError, UsageError
from pageferry.migration import messages
from pageferry.migration.channel import Channel
from pageferry.migration.messages import AnyMessage

log = getLogger(__name__)

INDEX_BYTES = 4
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

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def resolve(text: str, *, insecure: bool, what: str) -> Address:
    """The address of `HOST:PORT` or `[IPV6]:PORT`.

    Plain TCP is neither encrypted nor authenticated, so other addresses than loopback need `insecure`.
    Raises UsageError.
    """
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{what} {text!r}: give HOST:PORT, for example 127.0.0.1:7070")
    host = host.strip("[]") or "127.0.0.1"
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"{what} {text!r}: {error}") from error
    address = str(found[0][4][0])
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback and not insecure:
        raise UsageError(
            f"{what} {text}: memory would cross the network in the clear, readable and forgeable by anybody on the "
            f"way; use a loopback address (through a tunnel), or --insecure where the network is yours alone"
        )
    return Address(address, int(port))


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
            f"no answer from {address} ({str(error) or 'timed out'}): is `pageferry receive` running there?"
        ) from error
    return connection


async def connect_control(address: Address, patience: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A control connection to a receiver. Raises ConnectionLost."""
    connection = await _connect(address, patience)
    reader, writer = await asyncio.open_connection(sock=connection)
    writer.write(messages.CONTROL_MAGIC)
    return reader, writer


async def connect_stream(address: Address, token: bytes, index: int, patience: float) -> socket.socket:
    """A page stream to a receiver: a blocking socket, for the engine. Raises ConnectionLost."""
    connection = await _connect(address, patience)
    greeting = messages.STREAM_MAGIC + token + index.to_bytes(INDEX_BYTES, "big")
    try:
        async with asyncio.timeout(patience):
            await asyncio.get_running_loop().sock_sendall(connection, greeting)
    except (OSError, TimeoutError) as error:
        connection.close()
        raise ConnectionLost(f"page stream to {address}: {str(error) or 'timed out'}") from error
    connection.setblocking(True)
    _widen(connection)
    return connection


async def connect_streams(
    address: Address, token: bytes, numbers: Sequence[int], patience: float
) -> list[socket.socket]:
    """Page streams of these numbers, in order. Raises ConnectionLost; none is left open then."""
    with contextlib.ExitStack() as opened:
        streams = [opened.enter_context(await connect_stream(address, token, index, patience)) for index in numbers]
        opened.pop_all()
        return streams


class Reception:
    """A listening socket that tells control connections and page streams apart by how they begin.

    Every connection is greeted by a task of its own, so that one that says nothing keeps nobody else waiting; what
    does not begin as it must within `GREETING` seconds is closed. `patience` is that of the control connections.
    """

    def __init__(self, address: Address, patience: float = 30.0) -> None:
        self._patience = patience
        self._socket = _listen(address)
        host, port = self._socket.getsockname()[:2]
        self.address = Address(host, port)
        """Where it listens; the port is the one the kernel chose when 0 was asked for."""
        self._controls: asyncio.Queue[tuple[Channel, AnyMessage]] = asyncio.Queue(MAX_WAITING)
        self._expected: dict[bytes, asyncio.Queue[tuple[int, socket.socket]]] = {}
        self._greeters: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._accept())

    async def control(self) -> tuple[Channel, AnyMessage]:
        """The next control connection, and the first message that came over it."""
        return await self._controls.get()

    def expect(self, token: bytes) -> None:
        """From now on, page streams that begin with this token are kept for `streams`."""
        self._expected[token] = asyncio.Queue()

    async def streams(self, token: bytes, count: int, patience: float) -> list[socket.socket]:
        """All page streams that begin with the token, in their order, as blocking sockets.

        Raises ConnectionLost when they do not all come, ProtocolError for a number twice or out of range.
        """
        found: dict[int, socket.socket] = {}
        try:
            async with asyncio.timeout(patience):
                while len(found) < count:
                    index, connection = await self._expected[token].get()
                    if index >= count or index in found:
                        connection.close()
                        raise ProtocolError(f"page stream number {index} of {count}, or twice")
                    connection.setblocking(True)
                    found[index] = connection
        except BaseException as error:
            for connection in found.values():
                connection.close()
            if isinstance(error, TimeoutError):
                raise ConnectionLost(f"{len(found)} of {count} page streams came within {patience:g} s") from error
            raise
        finally:
            waiting = self._expected.pop(token)
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
                magic = await _read_exactly(connection, len(messages.CONTROL_MAGIC))
                if magic == messages.CONTROL_MAGIC:
                    kept = True  # by the channel
                    await self._greet_source(connection)
                elif magic == messages.STREAM_MAGIC:
                    token = await _read_exactly(connection, messages.TOKEN_BYTES)
                    index = int.from_bytes(await _read_exactly(connection, INDEX_BYTES), "big")
                    if queue := self._expected.get(token):
                        queue.put_nowait((index, connection))
                        kept = True
        except (OSError, EOFError, TimeoutError):
            pass  # nobody we know
        finally:
            if not kept:
                connection.close()

    async def _greet_source(self, connection: socket.socket) -> None:
        channel = Channel(*await asyncio.open_connection(sock=connection), self._patience)
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
