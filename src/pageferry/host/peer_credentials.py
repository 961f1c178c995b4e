"""Credentials of the process at the other end of a Unix socket (SO_PEERCRED), as the kernel has recorded them."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("3i")
"""Layout of struct ucred."""


class Credentials(NamedTuple):
    """Process that has connected, or that called listen(2), at the time of that call."""

    pid: int
    """Process id; 0 if the process is not visible in the PID namespace of this process."""
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> Credentials:
    """Return the credentials of the peer of a connected Unix socket. Raises OSError."""
    return Credentials(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
