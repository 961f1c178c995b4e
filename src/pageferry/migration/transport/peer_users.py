"""User of the peer process of a connection on this host.

Without certificates, the kernel authenticates a peer on the same host. On a Unix socket, SO_PEERCRED reports its user.
For TCP, sock_diag(7) reports the owner of every socket of this network namespace. Only root, and the users that can act
for the workload without pageferry, can hand over or receive it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Collection, Iterable

from pageferry.errors import AuthenticationError
from pageferry.host.peer_credentials import peer_credentials
from pageferry.migration.transport.addresses import is_loopback

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR, _NLM_F_REQUEST = 20, 2, 1
_ESTABLISHED, _LISTEN = 1, 10
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr"""
_REQUEST = struct.Struct("=BBBxI2s2s16s16sIII")
"""struct inet_diag_req_v2"""
_REPLY = struct.Struct("=BBBB2s2s16s16sIIIIIIII")
"""struct inet_diag_msg"""
_NO_COOKIE = 0xFFFFFFFF
_TIMEOUT = 2.0


def owners_of(pids: Iterable[int] = ()) -> frozenset[int]:
    """Return the users other than root that may act for a workload: our user, and the users of its processes."""
    users = {os.geteuid()}
    for pid in pids:
        with contextlib.suppress(OSError):  # the process has exited
            users.add(os.stat(f"/proc/{pid}").st_uid)
    return frozenset(users)


def check_peer(connection: socket.socket, owners: Collection[int]) -> bool:
    """Return whether the peer process belongs to root or one of `owners`, or is on another host.

    Return False if the peer is on this host and has not accepted the connection yet. Raises AuthenticationError for
    another user, ConnectionResetError if the peer has closed the connection.
    """
    user = peer_credentials(connection).uid if connection.family == socket.AF_UNIX else _tcp_user(connection)
    if user is None:
        return False
    if user not in (0, -1, *owners):
        raise AuthenticationError(
            f"the peer is a process of user {user}; without certificates, only root and user "
            f"{', '.join(map(str, sorted(owners)))} can hand over or receive this workload; use one of these "
            "users, or `tls`"
        )
    return True


def _tcp_user(connection: socket.socket) -> int | None:
    """Return the user of the peer's socket; -1 if the peer is on another host, None if no process has accepted the
    connection yet.

    Raises AuthenticationError if the user cannot be determined, ConnectionResetError if the peer has closed the
    connection.
    """
    ours, theirs = connection.getsockname(), connection.getpeername()
    try:
        state, user, inode = _diagnose(connection.family, theirs, ours)
    except FileNotFoundError:
        if not is_loopback(theirs[0]):
            return -1
        if _is_closed(connection):
            raise ConnectionResetError("the peer has closed the connection") from None
        raise AuthenticationError(
            "cannot identify the user of the peer: the peer is in another network namespace of this host; use `tls`"
        ) from None
    except OSError as error:
        if not is_loopback(theirs[0]):
            return -1
        raise AuthenticationError(
            f"cannot identify the user of the peer: {error}; use a Unix socket (unix:PATH), or `tls`"
        ) from error
    if inode and state != _LISTEN:
        return user
    if state != _ESTABLISHED:  # without an inode, the user in the reply is 0 and has no meaning
        raise ConnectionResetError("the peer has closed the connection")
    return None


def _is_closed(connection: socket.socket) -> bool:
    """Return whether the peer has closed or reset the connection."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))  # POLLHUP and POLLERR are always reported


def _diagnose(family: socket.AddressFamily, local: tuple[str, int], remote: tuple[str, int]) -> tuple[int, int, int]:
    """Return (state, user, inode) of the TCP socket between two addresses. Raises FileNotFoundError if there is none,
    OSError."""
    ends = [socket.inet_pton(family, end[0].partition("%")[0]).ljust(16, b"\0") for end in (local, remote)]
    ports = [end[1].to_bytes(2, "big") for end in (local, remote)]
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF, *ports, *ends, 0, _NO_COOKIE, _NO_COOKIE)
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_TIMEOUT)
        netlink.send(header + request)
        reply = netlink.recv(8192)
    kind = _HEADER.unpack_from(reply)[1]
    if kind == _NLMSG_ERROR:
        number = -struct.unpack_from("=i", reply, _HEADER.size)[0]
        raise OSError(number or errno.EPROTO, os.strerror(number or errno.EPROTO))
    fields = _REPLY.unpack_from(reply, _HEADER.size)
    if fields[4:6] != tuple(ports):
        raise FileNotFoundError(errno.ENOENT, "no such connection")
    return fields[1], fields[14], fields[15]
