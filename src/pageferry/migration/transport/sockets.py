"""TCP and Unix sockets of a migration: connecting to the addresses of a host, and listening."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from pathlib import Path

from pageferry.errors import ConnectionLost, UsageError
from pageferry.host import files
from pageferry.migration.transport.addresses import Address

MAX_GREETINGS = 64
"""Maximum number of connections being greeted, and length of the listen backlog."""
UNACKNOWLEDGED = 16 << 20
"""Send buffer of a page stream, bytes: enough for 1 Gbit/s over 100 ms, or 10 Gbit/s over 10 ms."""
UNSENT = 1 << 20
"""Maximum number of unsent bytes of a page stream in the kernel. A larger queue would count as sent, and hide that a
slow link still makes progress."""
SO_SNDBUFFORCE = 32
"""Socket option, see socket(7); missing in Python's socket module."""
MIN_ATTEMPT = 0.5
"""Minimum time for each address of a host, seconds, unless less of the total time is left."""


async def connect(address: Address, timeout: float) -> tuple[socket.socket, Address]:
    """Try the addresses in order, within `timeout` seconds in total. Return the first connection, and its address.

    Raises ConnectionLost with each address and its error.
    """
    deadline = time.monotonic() + timeout
    each, failures = address.each, []
    for number, one in enumerate(each):
        left = deadline - time.monotonic()
        share = max(left / (len(each) - number), min(left, MIN_ATTEMPT))
        try:
            return await _connect(one, share, timeout), one
        except (OSError, TimeoutError) as error:
            failures.append(f"{one} ({str(error) or 'timed out'})")
    which = "the address" if len(each) == 1 else f"any address of {address.name}:"
    raise ConnectionLost(f"cannot connect to {which} {', '.join(failures)}; start `pageferry receive` there")


async def _connect(address: Address, seconds: float, timeout: float) -> socket.socket:
    connection = socket.socket(address.family, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(seconds):
            target = address.path or (address.host, address.port)
            await asyncio.get_running_loop().sock_connect(connection, target)
        _tune(connection, timeout)
    except BaseException:
        connection.close()
        raise
    return connection


def _tune(connection: socket.socket, timeout: float) -> None:
    """Disable Nagle's algorithm, and have the kernel detect a lost peer too (TCP only)."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout * 1000))


def widen(connection: socket.socket) -> None:
    """Enlarge the send buffer for links of high latency: autotuning stops at `net.ipv4.tcp_wmem`, which limits a link
    of 50 ms to 80 MB/s."""
    buffered = UNSENT
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        buffered = UNACKNOWLEDGED
    with contextlib.suppress(PermissionError):  # needs CAP_NET_ADMIN; SO_SNDBUF would often shrink the buffer
        connection.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, buffered)


class Listener:
    """Listening socket. Closing a Unix socket removes its path. Raises UsageError."""

    def __init__(self, address: Address) -> None:
        self.socket = socket.socket(address.family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self._file: tuple[int, int] | None = None
        try:
            self.address = self._bind_unix(address) if address.path else self._bind_tcp(address)
        except OSError as error:
            self.socket.close()
            raise UsageError(f"cannot listen on {address}: {error.strerror or error}") from error
        except BaseException:
            self.socket.close()
            raise

    def _bind_tcp(self, address: Address) -> Address:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind((address.host, address.port))
        self.socket.listen(MAX_GREETINGS)
        return Address(*self.socket.getsockname()[:2])

    def _bind_unix(self, address: Address) -> Address:
        path = Path(address.path)
        files.check_private(path.parent, "use a directory that only you can write to")
        _remove_left_over(path)
        files.bind_private(self.socket, str(path))
        self.socket.listen(MAX_GREETINGS)
        found = path.lstat()
        self._file = found.st_dev, found.st_ino
        return address

    def close(self) -> None:
        """Close the socket, and remove its path if the path still leads to our socket."""
        self.socket.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                found = os.lstat(self.address.path)
                if (found.st_dev, found.st_ino) == self._file:
                    os.unlink(self.address.path)


def _remove_left_over(path: Path) -> None:
    """Remove the socket of a receiver that was killed. Raises UsageError for any other file. Also raises OSError."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(f"cannot listen on unix:{path}: the path is a file other than a socket; use another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        with contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise UsageError(f"cannot listen on unix:{path}: another process listens there; use another path")
    path.unlink(missing_ok=True)
