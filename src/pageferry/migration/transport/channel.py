"""Control connection: typed messages over a stream, with a timeout on every wait.

A task reads continuously, so that an Abort or a lost link is noticed at once and ends the operation in progress: see
`Channel.during`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol, TypeVar

import msgspec

from pageferry.errors import AuthenticationError, ConnectionLost, MigrationError, PeerRefused, ProtocolError
from pageferry.migration.transport import messages
from pageferry.migration.transport.addresses import Address
from pageferry.migration.transport.messages import Abort, Alive, AnyMessage, Message
from pageferry.migration.transport.tls import Peer

T = TypeVar("T")
M = TypeVar("M", bound=Message)

KEEPALIVE_INTERVAL = 1.0
"""Seconds between keepalives."""
QUEUED = 16
"""Maximum number of received messages that are queued. While the queue is full, nothing is read from the peer."""
ANSWER = 4.0
"""Time for which a side waits for the next expected message, as a multiple of the timeout. Keepalives do not extend
this time."""
REASON_TIMEOUT = 0.5
"""Seconds to wait for the peer's reason after a connection has failed."""


class Reader(Protocol):
    """Subset of asyncio.StreamReader that `Channel` uses."""

    async def readexactly(self, n: int, /) -> bytes: ...


class Writer(Protocol):
    """Subset of asyncio.StreamWriter that `Channel` uses."""

    def write(self, data: bytes, /) -> None: ...
    async def drain(self) -> None: ...
    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...


class Channel:
    """Control connection to a peer. `timeout`: seconds of silence after which the peer counts as lost."""

    def __init__(
        self,
        reader: Reader,
        writer: Writer,
        timeout: float,
        peer: Peer | None = None,
        *,
        address: Address | None = None,
        owners: Collection[int] = frozenset(),
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.timeout = timeout
        self.peer = peer
        """Authenticated peer; None without TLS."""
        self.address = address
        """Address to which this side has connected; None if the peer has connected."""
        self.owners = owners
        """Users other than root that the peer process may belong to; used only without TLS."""
        self.limit = messages.MAX_MESSAGE
        """Maximum length of a message from the peer, bytes."""
        self._inbox: asyncio.Queue[AnyMessage] = asyncio.Queue(QUEUED)
        self._failure: asyncio.Future[MigrationError] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._send_keepalives())]

    @property
    def failure(self) -> MigrationError | None:
        """Cause of the connection's failure; None while the connection works."""
        return self._failure.result() if self._failure.done() else None

    async def send(self, message: Message) -> None:
        """Send one message. Raises ConnectionLost."""
        try:
            self._writer.write(messages.encode(message))
            async with asyncio.timeout(self.timeout):
                await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise await self._lost(f"connection to the peer failed: {str(error) or type(error).__name__}") from error

    async def receive(self, kind: type[M], within: float | None = None) -> M:
        """Return the next message, which must be of this kind and be received within `within` seconds (default:
        `ANSWER` times the timeout).

        Raises PeerRefused (the peer sent Abort), ProtocolError (it sent another message), ConnectionLost.
        """
        message = await self._next(kind.__name__, within)
        if not isinstance(message, kind):
            raise ProtocolError(f"the peer sent {type(message).__name__} instead of {kind.__name__}")
        return message

    async def receive_any(
        self, expected: str = "the next message", progress: Callable[[], int] = lambda: 0
    ) -> AnyMessage:
        """Return the next message, of any kind. `expected`: description of the message for the error if none is
        received. `progress`: number of bytes that other connections to the peer have transferred; while it changes, the
        wait is not limited. Raises the same errors as `receive`."""
        return await self._next(expected, progress=progress)

    async def during(self, work: Awaitable[T]) -> T:
        """Return the result of `work`. If the connection fails first, cancel `work` and raise the failure."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._failure), return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled() and task.exception() is None:
                return task.result()
            if not task.done():
                raise self._failure.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(BaseException):
                    await task
        try:
            return task.result()
        except ConnectionLost as error:
            raise await self._lost(str(error)) from error

    async def abort(self, reason: str) -> None:
        """Send Abort to the peer, if the connection still works."""
        with contextlib.suppress(MigrationError):
            await self.send(Abort(reason=reason[:4096]))

    async def close(self) -> None:
        """Close the connection."""
        for task in self._tasks:
            task.cancel()
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(REASON_TIMEOUT):
                await self._writer.wait_closed()

    async def _next(
        self, what: str, within: float | None = None, progress: Callable[[], int] = lambda: 0
    ) -> AnyMessage:
        """Return the next message. Keepalives do not extend the wait: a paused workload may depend on the message."""
        seconds = ANSWER * self.timeout if within is None else within
        received = asyncio.ensure_future(self.during(self._inbox.get()))
        before = progress()
        try:
            while not (await asyncio.wait((received,), timeout=seconds))[0]:
                if (now := progress()) == before:
                    raise ConnectionLost(f"the peer is alive but has not sent {what} for {seconds:g} s")
                before = now
            return received.result()
        finally:
            received.cancel()
            await asyncio.gather(received, return_exceptions=True)

    async def _lost(self, reason: str) -> MigrationError:
        """Return the failure to report: the peer's reason if it is received within `REASON_TIMEOUT` seconds."""
        await asyncio.wait((self._failure,), timeout=REASON_TIMEOUT)
        if self._failure.done() and isinstance(self._failure.result(), PeerRefused | AuthenticationError):
            return self._failure.result()
        return ConnectionLost(reason)

    def _fail(self, failure: MigrationError) -> None:
        if not self._failure.done():
            self._failure.set_result(failure)

    async def _listen(self) -> None:
        try:
            while True:
                message = await self._read()
                if isinstance(message, Abort):
                    raise PeerRefused(f"the peer ended the migration: {message.reason}")
                if not isinstance(message, Alive):
                    await self._inbox.put(message)
        except TimeoutError:  # from asyncio.timeout, or from the kernel (TCP_USER_TIMEOUT)
            self._fail(ConnectionLost(f"the peer has been silent for {self.timeout:g} s"))
        except (EOFError, OSError) as error:
            self._fail(ConnectionLost(f"the peer closed the connection{f': {error}' if str(error) else ''}"))
        except MigrationError as error:
            self._fail(error)

    async def _read(self) -> AnyMessage:
        async with asyncio.timeout(self.timeout):
            try:
                length = int.from_bytes(await self._reader.readexactly(4), "big")
                if length > self.limit:
                    raise ProtocolError(f"the peer announced a message of {length} bytes, the limit is {self.limit}")
                body = await self._reader.readexactly(length)
            except asyncio.IncompleteReadError as error:
                raise EOFError from error
        try:
            return messages.decode(body)
        except msgspec.MsgspecError as error:
            messages.check_version(messages.version_of(body))
            raise ProtocolError(f"the peer sent an invalid message: {error}") from error

    async def _send_keepalives(self) -> None:
        sent = messages.encode(Alive())
        while True:
            await asyncio.sleep(KEEPALIVE_INTERVAL)
            if self._failure.done():
                return  # asyncio prints a warning for each write to a closed connection
            with contextlib.suppress(OSError):
                self._writer.write(sent)
