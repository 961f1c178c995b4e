"""The control connection: typed messages over a stream, with every wait bounded.

A task reads all the time, so that an Abort or a lost link is noticed at once and ends whatever is under way: see
`Channel.during`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Collection
from typing import Protocol, TypeVar

import msgspec

from pageferry.errors import AuthenticationError, ConnectionLost, MigrationError, PeerRefused, ProtocolError
from pageferry.migration import messages
from pageferry.migration.addresses import Address
from pageferry.migration.messages import Abort, Alive, AnyMessage, Message
from pageferry.migration.trust import Peer

T = TypeVar("T")
M = TypeVar("M", bound=Message)

BEAT = 1.0
"""Seconds between signs of life."""
QUEUED = 16
"""Messages that may wait to be looked at; a peer that sends more has to wait."""
ANSWER = 4.0
"""Times its timeout that a side waits for what the peer has to say next, however alive that says it is."""
LAST_WORDS = 0.5
"""Seconds to wait for the peer's reason after a connection failed."""


class Reader(Protocol):
    """What is used of an asyncio.StreamReader."""

    async def readexactly(self, n: int, /) -> bytes: ...


class Writer(Protocol):
    """What is used of an asyncio.StreamWriter."""

    def write(self, data: bytes, /) -> None: ...
    async def drain(self) -> None: ...
    def close(self) -> None: ...
    async def wait_closed(self) -> None: ...


class Channel:
    """A control connection to a peer. `timeout`: seconds of silence after which the peer counts as lost."""

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
        """Who it is, if the connection is secure."""
        self.address = address
        """Where it was connected to; None where the peer connected."""
        self.owners = owners
        """Users besides root that the peer may be of, if the connection is not secure."""
        self.limit = messages.MAX_MESSAGE
        """Largest message that is accepted from the peer, bytes."""
        self._inbox: asyncio.Queue[AnyMessage] = asyncio.Queue(QUEUED)
        self._failure: asyncio.Future[MigrationError] = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]

    @property
    def failure(self) -> MigrationError | None:
        """Why nothing comes any more; None while the connection is well."""
        return self._failure.result() if self._failure.done() else None

    async def send(self, message: Message) -> None:
        """Send one message. Raises ConnectionLost."""
        try:
            self._writer.write(messages.encode(message))
            async with asyncio.timeout(self.timeout):
                await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise await self._lost(f"the connection to the peer broke: {str(error) or type(error).__name__}") from error

    async def receive(self, kind: type[M], within: float | None = None) -> M:
        """The next message, which must be of this kind, and come within so many seconds (default: `ANSWER`).

        Raises PeerRefused (it sent Abort), ProtocolError (it sent something else), ConnectionLost.
        """
        message = await self._next(kind.__name__, within)
        if not isinstance(message, kind):
            raise ProtocolError(f"the peer sent {type(message).__name__} where {kind.__name__} belongs")
        return message

    async def receive_any(self) -> AnyMessage:
        """The next message, whatever it is. Raises as `receive`."""
        return await self._next("what comes next")

    async def during(self, work: Awaitable[T]) -> T:
        """The result of `work`, unless the connection fails first: then `work` is cancelled and the failure raised."""
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
        """Tell the peer that the migration is over, if it can still be told."""
        with contextlib.suppress(MigrationError):
            await self.send(Abort(reason=reason[:4096]))

    async def close(self) -> None:
        """Close the connection."""
        for task in self._tasks:
            task.cancel()
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self._writer.wait_closed()

    async def _next(self, what: str, within: float | None = None) -> AnyMessage:
        """The next message. Signs of life are not enough here: a paused workload may wait for it."""
        seconds = ANSWER * self.timeout if within is None else within
        try:
            async with asyncio.timeout(seconds):
                return await self.during(self._inbox.get())
        except TimeoutError as slow:
            raise ConnectionLost(f"the peer is alive, and has not said {what} for {seconds:g} s") from slow

    async def _lost(self, reason: str) -> MigrationError:
        """The failure to report: the peer's own reason, if one arrives within a moment."""
        await asyncio.wait((self._failure,), timeout=LAST_WORDS)
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
        except TimeoutError:  # ours, or the kernel's (TCP_USER_TIMEOUT)
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
            raise ProtocolError(f"the peer sent a message that makes no sense: {error}") from error

    async def _beat(self) -> None:
        sent = messages.encode(Alive())
        while True:
            await asyncio.sleep(BEAT)
            with contextlib.suppress(OSError):
                self._writer.write(sent)
