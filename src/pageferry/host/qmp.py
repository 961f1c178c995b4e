"""A session with QEMU's machine protocol (QMP), with the errors of pageferry.

A QMP socket serves one client at a time; the others wait in its backlog and get no greeting. So sessions are opened
late and closed early, and who waits too long is told why.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
from collections.abc import Iterator, Mapping
from typing import Any, cast

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError, Runstate

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.qmp_peer import Peer, peer_of

TIMEOUT = 10.0
"""Seconds to wait for the greeting: a command that has the session open keeps it for less."""

Command = dict[str, Any]
"""A QMP command as data, as it goes over the wire: `execute` and perhaps `arguments`."""

_LOOK_AGAIN = 0.2
"""Seconds between two looks at whether QEMU is still there, while no event comes."""


class _Client(QMPClient):
    """A client that may be let go of without waiting, which the library does not provide for."""

    def expect_abandonment(self) -> None:
        """What ends the session is told by the call that it cuts off; there need not be any."""
        if self._bh_tasks is not None:
            self._bh_tasks.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    @property
    def hung_up(self) -> bool:
        """Whether the other end of the connection is closed."""
        if self.runstate is not Runstate.RUNNING or self._writer is None:
            return True
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))  # POLLHUP and POLLERR count without being asked for

    def abandon(self) -> None:
        """Close the connection at once, with or without an event loop that would have the time for it."""
        if self._writer is not None:
            self._writer.transport.abort()


class Monitor:
    """An open session. Use `open`; close it, or use it as an asynchronous context manager."""

    def __init__(self, client: _Client, path: str, peer: Peer) -> None:
        self._client = client
        self._commands: frozenset[str] | None = None
        self.path = path
        self.peer = peer
        """The process that listens on the socket."""

    @classmethod
    async def open(cls, path: str, *, timeout: float = TIMEOUT) -> Monitor:
        """Connect to the socket at `path` and wait up to `timeout` seconds for QEMU to answer.

        Raises WorkloadDied where nobody listens, WorkloadError where somebody else has the session, or it is no QMP.
        """
        connection = await _connect(path, timeout)
        client = _Client()
        try:
            peer = peer_of(connection)
            async with asyncio.timeout(timeout):
                await client.connect(connection)
        except TimeoutError as late:
            connection.close()
            raise WorkloadError(
                f"no QMP greeting from {path} within {timeout:g} s: another client holds its only session, or "
                "QEMU does not respond; close that client, or retry"
            ) from late
        except QMPError as wrong:
            connection.close()
            raise WorkloadError(
                f"cannot open a QMP session on {path}: {wrong}; use a socket created with QEMU's -qmp option"
            ) from wrong
        client.expect_abandonment()
        return cls(client, path, peer)

    @property
    def qemu_version(self) -> str:
        """As QEMU greets, such as `10.0.2`: to be told, never to be compared."""
        greeting = self._client.greeting
        assert greeting is not None
        numbers = cast("Mapping[str, int]", greeting.QMP.version["qemu"])
        return ".".join(str(numbers[part]) for part in ("major", "minor", "micro"))

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return what it returns. Underscores in argument names stand for hyphens.

        Raises WorkloadError with QEMU's words where it refuses, WorkloadDied where it goes away.
        """
        return await self._execute(
            command, {name.replace("_", "-"): value for name, value in arguments.items()} or None
        )

    async def run(self, command: Command) -> Any:
        """Run a QMP command that is kept as data. Raises as `execute`."""
        return await self._execute(command["execute"], command.get("arguments"))

    async def _execute(self, command: str, arguments: dict[str, Any] | None) -> Any:
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as refused:
            raise WorkloadError(f"QEMU rejected {command}: {refused}") from refused
        except (QMPError, EOFError, OSError) as gone:
            raise WorkloadDied(f"QEMU closed the monitor during {command}") from gone

    async def give_descriptor(self, name: str, descriptor: int) -> None:
        """Pass a copy of an open file to QEMU (`getfd`), which then knows it as `fd:NAME`."""
        self._client.send_fd_scm(descriptor)
        await self.execute("getfd", fdname=name)

    async def add_descriptor(self, fdset: int, descriptor: int) -> None:
        """Pass a copy of an open file to QEMU (`add-fd`), which can open it as `/dev/fdset/FDSET`."""
        self._client.send_fd_scm(descriptor)
        await self.execute("add-fd", fdset_id=fdset)

    async def supports(self, command: str) -> bool:
        """Whether this QEMU has a QMP command of that name."""
        if self._commands is None:
            self._commands = frozenset(one["name"] for one in await self.execute("query-commands"))
        return command in self._commands

    @contextlib.contextmanager
    def events(self, name: str) -> Iterator[EventListener]:
        """Listen to one kind of event from here on; to be read with `next_event`."""
        with self._client.listener(name) as listener:
            yield listener

    def listen(self, *names: str) -> EventListener:
        """Listen to these kinds of events until the session ends."""
        listener = EventListener(names)
        self._client.register_listener(listener)
        return listener

    async def next_event(self, listener: EventListener) -> dict[str, Any]:
        """The data of the next event. Raises WorkloadDied when QEMU goes away instead."""
        waiting = asyncio.ensure_future(listener.get())
        try:
            while not (await asyncio.wait({waiting}, timeout=_LOOK_AGAIN))[0]:
                if self._client.runstate is not Runstate.RUNNING:
                    raise WorkloadDied("QEMU went away")
            return cast("dict[str, Any]", waiting.result().get("data", {}))
        finally:
            waiting.cancel()

    @property
    def hung_up(self) -> bool:
        """Whether QEMU has closed its end: by now, and not only as far as the event loop has come."""
        return self._client.hung_up

    async def left_unread(self) -> bool:
        """After a command without an answer: whether QEMU is known to have ended without having read all of it.

        A Unix socket whose other end is closed says ECONNRESET where something was still unread there, EPIPE where it
        was closed before. What comes to QEMU ends with the brace that it cannot do without.
        """
        try:
            await self._client.disconnect()
        except (ConnectionResetError, BrokenPipeError):
            return True
        except (QMPError, EOFError, OSError):
            pass
        return False

    def abandon(self) -> None:
        """Cut the session without waiting; QEMU takes the next client."""
        self._client.abandon()

    async def close(self) -> None:
        """End the session."""
        # What ended it, if it has ended already, was told to whoever was speaking.
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()

    async def __aenter__(self) -> Monitor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _connect(path: str, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        while True:
            try:
                connection.connect(path)
            except BlockingIOError:  # the backlog is full of others who wait
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.02)
            else:
                return connection
    except BaseException as failed:
        connection.close()
        if isinstance(failed, OSError):
            raise _connection_error(path, failed) from failed
        raise


def _connection_error(path: str, failed: OSError) -> WorkloadError:
    if failed.errno in (errno.ENOENT, errno.ECONNREFUSED):
        return WorkloadDied(f"cannot connect to {path}: no QEMU listens on it")
    if failed.errno == errno.EAGAIN:
        return WorkloadError(f"cannot connect to {path}: too many clients are waiting for it; close them, or retry")
    return WorkloadError(f"cannot connect to {path}: {failed.strerror or failed}")
