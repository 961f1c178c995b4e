"""Addresses of receivers: `unix:PATH` on the same host, otherwise `HOST:PORT`."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass, replace

from pageferry import values
from pageferry.errors import UsageError
from pageferry.host.registry import MAX_SOCKET_PATH
from pageferry.migration.transport.tls import Trust

UNIX = "unix:"
MAX_ADDRESSES = 16
"""Maximum number of addresses tried per host name."""


@dataclass(frozen=True, slots=True)
class Address:
    """Resolved address: of a Unix socket if `path` is set, otherwise of a TCP socket."""

    host: str
    port: int
    name: str = ""
    """Host as given by the user."""
    others: tuple[str, ...] = ()
    """Further addresses of that host, in the order in which they are tried."""
    path: str = ""

    @property
    def family(self) -> socket.AddressFamily:
        """Address family of the socket."""
        if self.path:
            return socket.AF_UNIX
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def each(self) -> list[Address]:
        """Addresses of the host, each with a single IP address."""
        return [replace(self, host=host, others=()) for host in (self.host, *self.others)]

    def __str__(self) -> str:
        if self.path:
            return f"{UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def resolve(text: str, *, insecure: bool, what: str, trust: Trust | None = None) -> Address:
    """Resolve `unix:PATH`, `HOST:PORT` or `[IPV6]:PORT`.

    TCP without TLS is not encrypted, and only the kernel of a single host can authenticate both peers. Addresses other
    than loopback therefore require `trust` or `insecure`. Raises UsageError.
    """
    if insecure and trust is not None:
        raise UsageError("`tls` and `insecure` are mutually exclusive: remove one of them")
    if values.text("address", text).startswith(UNIX):
        return _unix(text, what, trust)
    host, separator, port = text.rpartition(":")
    if not separator or not (port.isascii() and port.isdigit() and len(port) < 6) or int(port) > 65535:
        raise UsageError(
            f"invalid {what} {text!r}: expected HOST:PORT, such as 127.0.0.1:7070, or unix:PATH on one host"
        )
    host = host.strip("[]") or "127.0.0.1"
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot resolve {what} {text!r}: {error}") from error
    addresses = list(dict.fromkeys(str(one[4][0]) for one in found))[:MAX_ADDRESSES]
    if not all(map(is_loopback, addresses)) and not insecure and trust is None:
        raise UsageError(
            f"cannot use {what} {text}: memory would be transferred unencrypted; use `tls` DIR, a loopback address "
            "(through a tunnel), or `insecure` on a trusted network"
        )
    return Address(addresses[0], int(port), host, tuple(addresses[1:]))


def is_loopback(host: str) -> bool:
    """Return whether an IP address is a loopback address."""
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _unix(text: str, what: str, trust: Trust | None) -> Address:
    path = text.removeprefix(UNIX)
    if not path or "\0" in path:
        raise UsageError(
            f"invalid {what} {text!r}: expected unix:PATH with the path of a socket, such as unix:/run/web.sock"
        )
    if trust is not None:
        raise UsageError(
            f"cannot use {what} {text!r} with `tls`, which requires TCP: remove `tls` (on a Unix socket, the kernel "
            "reports the user of the peer)"
        )
    path = os.path.abspath(path)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise UsageError(f"invalid {what} {text!r}: expected a path of at most {MAX_SOCKET_PATH} bytes")
    return Address("", 0, path=path)
