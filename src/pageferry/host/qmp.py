"""Sessions of the QEMU Machine Protocol (QMP), which raise pageferry's errors.

A QMP socket serves one client at a time; other clients wait in its backlog without a greeting. Sessions are therefore
opened late and closed early. A session that receives no greeting in time fails with an error that states this reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.models import Greeting
from qemu.qmp.qmp_client import GreetingError, NegotiationError

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.qmp_peer import Peer, peer_of

TIMEOUT = 10.0
"""Seconds to wait for the greeting. QEMU serves one QMP client at a time, and every pageferry command closes its
session in less time."""

Command = dict[str, Any]
"""QMP command as sent on the wire: `execute` and, if the command has any, `arguments`."""

_NEGOTIATIONS = itertools.count(1)
"""Numbers for the ids of negotiations."""

_REPLY_KEYS = frozenset({"return", "error", "event"})
"""Keys of which every message of a QMP server, except the greeting, has one."""

_EXIT_WAITS = (0.0, 0.01, 0.1, 0.4)
"""Waits before each check whether a process that has closed a connection still listens, seconds."""

_LOOK_AGAIN = 0.2
"""Interval at which a session that waits for an event checks whether QEMU has closed the connection, seconds."""


class _Client(QMPClient):
    """QMP client whose connection can be closed without waiting, which the library does not support."""

    async def _get_greeting(self) -> Greeting:
        """Return the greeting. Raises GreetingError, EOFError, OSError.

        The library expects the greeting as the first message. But QEMU can first send the reply to a command of a
        previous client that closed its connection too early. Messages that lack the key `QMP`, but have a key of a
        reply or event, are dropped.
        """
        while "QMP" not in (message := await self._recv()) and not message.keys().isdisjoint(_REPLY_KEYS):
            pass
        try:
            return Greeting(message)
        except (KeyError, TypeError) as unlike:
            raise GreetingError("invalid QMP greeting", unlike) from unlike

    async def _negotiate(self) -> None:
        """Leave the negotiation mode (QMP `qmp_capabilities`). Raises NegotiationError, EOFError, OSError.

        The library expects the reply as the next message. But QEMU can first send events, and the reply to a command of
        a previous client that closed its connection too early. These messages are dropped.
        """
        greeting = self.greeting
        oob = greeting is not None and "oob" in greeting.QMP.capabilities
        message = self.make_execute_msg("qmp_capabilities", arguments={"enable": ["oob"]} if oob else {})
        message["id"] = number = f"negotiation-{next(_NEGOTIATIONS)}-{os.getpid()}"
        await self._send(message)
        while (reply := await self._recv()).get("id") != number:
            pass
        if "return" not in reply:
            raise NegotiationError("Negotiation failed", ValueError(str(reply.get("error"))))

    def expect_abandonment(self) -> None:
        """Retrieve the errors of the library's tasks, so that asyncio does not report them. A call that such an error
        interrupts still raises it."""
        if self._bh_tasks is not None:
            self._bh_tasks.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    @property
    def hung_up(self) -> bool:
        """Whether the connection is closed, or the peer has closed its side."""
        if self.runstate is not Runstate.RUNNING or self._writer is None:
            return True
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))  # POLLHUP and POLLERR are always reported

    def abandon(self) -> None:
        """Close the connection at once, with or without a running event loop."""
        if self._writer is not None:
            self._writer.transport.abort()


class Monitor:
    """Open QMP session, created by `open`. The caller closes it, or uses it as an asynchronous context manager."""

    def __init__(self, client: _Client, path: str, peer: Peer) -> None:
        self._client = client
        self._commands: frozenset[str] | None = None
        self.path = path
        self.peer = peer
        """Process that listens on the socket."""

    @classmethod
    async def open(cls, path: str, *, timeout: float = TIMEOUT) -> Monitor:
        """Connect to the socket at `path` and wait up to `timeout` seconds for the greeting.

        Raises WorkloadDied if no process listens, or if QEMU exits meanwhile; WorkloadError if another client has the
        session or if the socket is not a QMP socket.
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
                f"cannot open a QMP session on {path}: no greeting within {timeout:g} s, because another client "
                "holds its only session, or QEMU does not respond; close that client, or retry"
            ) from late
        except (QMPError, OSError, EOFError) as failed:
            connection.close()
            if _has_closed(failed):
                await _check_listens(path)
            raise WorkloadError(
                f"cannot open a QMP session on {path}: {failed}; use a socket created with QEMU's -qmp option"
            ) from failed
        except BaseException:  # cancelled: QEMU would serve no other client
            client.abandon()
            connection.close()
            raise
        client.expect_abandonment()
        return cls(client, path, peer)

    @property
    def qemu_version(self) -> str:
        """Version in QEMU's greeting, such as `10.0.2`; for display, not for comparisons."""
        greeting = self._client.greeting
        assert greeting is not None
        numbers = cast("Mapping[str, int]", greeting.QMP.version["qemu"])
        return ".".join(str(numbers[part]) for part in ("major", "minor", "micro"))

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its result. Underscores in argument names become hyphens.

        Raises WorkloadError with QEMU's message if the command fails, WorkloadDied if QEMU exits.
        """
        return await self._execute(
            command, {name.replace("_", "-"): value for name, value in arguments.items()} or None
        )

    async def run(self, command: Command) -> Any:
        """Run a QMP command given as data, and return its result. Raises the same errors as `execute`."""
        return await self._execute(command["execute"], command.get("arguments"))

    async def _execute(self, command: str, arguments: dict[str, Any] | None) -> Any:
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as refused:
            raise WorkloadError(f"cannot execute QMP {command}: {refused}") from refused
        except (QMPError, EOFError, OSError) as gone:
            raise WorkloadDied(f"QEMU closed the monitor during {command}") from gone

    async def give_descriptor(self, name: str, descriptor: int) -> None:
        """Pass a copy of a descriptor to QEMU (`getfd`), for use as `fd:NAME`."""
        self._client.send_fd_scm(descriptor)
        await self.execute("getfd", fdname=name)

    async def add_descriptor(self, fdset: int, descriptor: int) -> None:
        """Pass a copy of a descriptor to QEMU (`add-fd`), for use as `/dev/fdset/FDSET`."""
        self._client.send_fd_scm(descriptor)
        await self.execute("add-fd", fdset_id=fdset)

    async def supports(self, command: str) -> bool:
        """Return whether this QEMU has a QMP command of this name."""
        if self._commands is None:
            self._commands = frozenset(one["name"] for one in await self.execute("query-commands"))
        return command in self._commands

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventListener]:
        """Listen for events of these types during the block; read them with `next_event`."""
        with self._client.listener(names) as listener:
            yield listener

    def listen(self, *names: str) -> EventListener:
        """Return a listener for events of these types. It is active until the session ends."""
        listener = EventListener(names)
        self._client.register_listener(listener)
        return listener

    async def next_event(self, listener: EventListener) -> dict[str, Any]:
        """Return the data of the next event. Raises WorkloadDied if QEMU exits first."""
        return (await self.next_named_event(listener))[1]

    async def next_named_event(self, listener: EventListener) -> tuple[str, dict[str, Any]]:
        """Return the type and the data of the next event. Raises WorkloadDied if QEMU exits first."""
        waiting = asyncio.ensure_future(listener.get())
        try:
            while not (await asyncio.wait({waiting}, timeout=_LOOK_AGAIN))[0]:
                if self._client.runstate is not Runstate.RUNNING:
                    raise WorkloadDied("QEMU closed the monitor before it sent an expected event")
            event = cast("dict[str, Any]", waiting.result())
            return event["event"], event.get("data", {})
        finally:
            waiting.cancel()

    @property
    def hung_up(self) -> bool:
        """Whether the connection is closed, or QEMU has closed its side; True even before the event loop has processed
        this."""
        return self._client.hung_up

    async def left_unread(self) -> bool:
        """Return whether QEMU is known to have exited before it had read the whole of a command that received no reply.

        A Unix socket whose peer is closed returns ECONNRESET if the peer had unread data, and EPIPE if the peer was
        closed before the write. The last byte of a command is its closing brace, without which QEMU does not run the
        command.
        """
        try:
            await self._client.disconnect()
        except (ConnectionResetError, BrokenPipeError):
            return True
        except (QMPError, EOFError, OSError):
            pass
        return False

    def abandon(self) -> None:
        """Close the session without waiting. QEMU then serves the next client."""
        self._client.abandon()

    async def close(self) -> None:
        """Close the session, and wait until the connection is closed."""
        # If the session has already failed, the call that was running has raised the error.
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()

    async def __aenter__(self) -> Monitor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def event_time(event: Mapping[str, Any]) -> float:
    """Return the time of an event, on the clock of `time.perf_counter`."""
    stamp = event["timestamp"]
    age: float = time.time() - stamp["seconds"] - stamp["microseconds"] / 1e6
    return time.perf_counter() - age


def _has_closed(failed: BaseException) -> bool:
    """Return whether a session could not be opened because the peer has closed the connection."""
    cause = failed.exc if isinstance(failed, ConnectError) else failed
    return isinstance(cause, OSError | EOFError)


async def _check_listens(path: str) -> None:
    """Raise WorkloadDied unless a process listens at `path`. A process that exits closes its sockets one by one:
    wait for its listening socket."""
    for wait in _EXIT_WAITS:
        await asyncio.sleep(wait)
        (await _connect(path, TIMEOUT)).close()


async def _connect(path: str, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        while True:
            try:
                connection.connect(path)
            except BlockingIOError:  # the backlog is full of other waiting clients
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
