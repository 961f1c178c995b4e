"""Sockets of a migration, of TCP or Unix: connecting to every address of a name, and listening."""

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
from pageferry.migration.addresses import Address

MAX_GREETINGS = 64
"""Connections that may be greeted at once, and that may wait for it."""
UNACKNOWLEDGED = 16 << 20
"""Bytes of a page stream that may be under way: enough for 1 Gbit/s over 100 ms, or 10 Gbit/s over 10 ms."""
UNSENT = 1 << 20
"""Bytes of a page stream that may wait in the kernel. More would only be taken for sent, and keep a slow link from
showing that it is alive."""
SO_SNDBUFFORCE = 32
"""Of socket(7); Python does not name it."""
MIN_ATTEMPT = 0.5
"""Seconds that each address of a name has at least, if as many are left."""


async def connect(address: Address, timeout: float) -> tuple[socket.socket, Address]:
    """Connect to the first address that answers, in their order, within `timeout` seconds for all of them.

    Raises ConnectionLost, which names each address and its error.
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
    raise ConnectionLost(f"nothing answers at {which} {', '.join(failures)}: run `pageferry receive` there")


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
    """Small messages go at once; a dead peer is noticed by the kernel too."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout * 1000))


def widen(connection: socket.socket) -> None:
    """Let a long link be full: by itself the kernel stops at `net.ipv4.tcp_wmem`, 80 MB/s where it takes 50 ms."""
    buffered = UNSENT
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        buffered = UNACKNOWLEDGED
    with contextlib.suppress(PermissionError):  # needs CAP_NET_ADMIN; SO_SNDBUF would often make it smaller
        connection.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, buffered)


class Listener:
    """A listening socket; that of a Unix socket has its path removed when it is closed. Raises UsageError."""

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
        files.check_private(path.parent, "give unix:PATH in a folder that is yours alone")
        _remove_left_over(path)
        files.bind_private(self.socket, str(path))
        self.socket.listen(MAX_GREETINGS)
        found = path.lstat()
        self._file = found.st_dev, found.st_ino
        return address

    def close(self) -> None:
        """Close the socket, and remove its file if it is still ours."""
        self.socket.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                found = os.lstat(self.address.path)
                if (found.st_dev, found.st_ino) == self._file:
                    os.unlink(self.address.path)


def _remove_left_over(path: Path) -> None:
    """Remove the socket of a receiver that was killed. Raises UsageError for any other file, OSError."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(f"cannot listen on unix:{path}: there is a file that is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        with contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise UsageError(f"cannot listen on unix:{path}: another process listens there")
    path.unlink(missing_ok=True)
