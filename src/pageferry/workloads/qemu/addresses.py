"""Addresses on which a QEMU command line makes QEMU listen, and a check that they are free.

QEMU reports a TCP port that is in use only after it has created its memory. A Unix socket that is in use is even
replaced: QEMU removes the socket of the other process, and no client can connect to that process any longer. Several
guests with one command line therefore need placeholders in their addresses (`placeholders`).

Addresses of these options are checked: -chardev, -serial, -parallel, -monitor, -qmp, -gdb, -vnc, -spice, and listening
back ends and port forwards of -netdev, -nic and -net.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pageferry.errors import AddressInUse, UsageError
from pageferry.workloads.qemu.option_syntax import ON, options, properties, property_list

_CHARACTER_DEVICES = frozenset(("serial", "parallel", "monitor", "qmp", "qmp-pretty", "gdb", "debugcon"))
"""Options whose value can be a character device in its short form, such as `tcp:HOST:PORT,server=on`."""
_NETWORKS = frozenset(("netdev", "nic", "net"))
_VNC_PORT = 5900
"""TCP port of VNC display 0."""

_HOST_AND_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*):(?P<port>\d+)")
_FORWARD = re.compile(r"(?:(?P<kind>tcp|udp):)?(?P<host>[^:]*):(?P<port>\d+)-.*")
_VNC = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*):(?P<display>\d+)")


@dataclass(frozen=True, slots=True)
class Address:
    """Address on which QEMU would listen."""

    option: str
    """Option that specifies the address, without its value."""
    path: str = ""
    """Path of a Unix socket; empty for other addresses."""
    host: str = ""
    """Host name or address; empty for all addresses of this host."""
    port: int = 0
    udp: bool = False

    def __str__(self) -> str:
        """Return the address for error messages."""
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'udp' if self.udp else 'tcp'}:{host}:{self.port}"

    @property
    def key(self) -> Address:
        """Address without its option, as a key for comparisons."""
        return Address("", os.path.abspath(self.path) if self.path else "", self.host, self.port, self.udp)

    @property
    def used(self) -> bool:
        """Whether another process listens on the address."""
        return _unix_used(self.path) if self.path else _port_used(self.host, self.port, udp=self.udp)


def refuse_used(name: str, arguments: Sequence[str]) -> None:
    """Raise AddressInUse if another process listens on an address of this QEMU command line. `name`: name of the guest,
    for the error message. Raises UsageError if the command line is invalid."""
    for address in addresses(arguments):
        if address.used:
            raise AddressInUse(
                f"cannot start {name}: {address} (option -{address.option}) is in use; end the process that listens "
                "there, or choose another address: {name} in the command line stands for the name of the guest"
            )


def refuse_repeated(commands: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise UsageError if two guests would listen on one address. `commands`: name and command line of each guest,
    without placeholders. Raises UsageError if a command line is invalid."""
    owners: dict[Address, str] = {}
    for name, arguments in commands:
        for address in addresses(arguments):
            owner = owners.setdefault(address.key, name)
            if owner != name:
                raise UsageError(
                    f"invalid option -{address.option}: {owner} and {name} would both listen on {address}; add {{n}} "
                    "or {name} to the address, which stand for the number and the name of the guest"
                )


def addresses(arguments: Sequence[str]) -> Iterator[Address]:
    """Yield the addresses on which a QEMU with this command line (program first) listens. Raises UsageError."""
    for name, value in options(arguments):
        if name == "s":
            yield Address("s", port=1234)
        elif name == "chardev":
            yield from _of_socket(name, properties(value, "backend"), "backend")
        elif name in _CHARACTER_DEVICES:
            yield from _of_character_device(name, value)
        elif name == "vnc":
            yield from _of_vnc(value)
        elif name == "spice":
            yield from _of_spice(properties(value, "port"))
        elif name in _NETWORKS:
            yield from _of_network(name, value)


def _of_socket(option: str, given: Mapping[str, str], kind: str) -> Iterator[Address]:
    """Yield the address of a character device that is a listening socket, or a UDP socket. `kind`: key of the device's
    type."""
    match given.get(kind):
        case "socket" if given.get("server") in ON and "to" not in given:
            if given.get("abstract") not in ON and given.get("path"):
                yield Address(option, path=given["path"])
            yield from _of_port(option, given.get("host", ""), given.get("port", ""))
        case "udp":
            yield from _of_port(option, given.get("localaddr", ""), given.get("localport", ""), udp=True)


def _of_character_device(option: str, value: str) -> Iterator[Address]:
    """Yield the address in the short form of a character device, such as `mon:unix:PATH,server=on`."""
    first, *rest = value.removeprefix("mon:").split(",", 1)
    kind, _, where = first.partition(":")
    listens = option == "gdb" or (rest and properties(f",{rest[0]}", "").get("server") in ON)
    if kind == "udp" and "@" in where:
        yield from _of_text(option, where.partition("@")[2], udp=True)
    elif kind == "unix" and listens:
        yield Address(option, path=where)
    elif kind in ("tcp", "telnet", "websocket") and listens:
        yield from _of_text(option, where)


def _of_vnc(value: str) -> Iterator[Address]:
    given = properties(value, "vnc")
    where = given.get("vnc", "")
    if given.get("reverse") in ON or "to" in given:
        return
    if where.startswith("unix:"):
        yield Address("vnc", path=where.removeprefix("unix:"))
    elif matched := _VNC.fullmatch(where):
        yield Address("vnc", host=matched["host"].strip("[]"), port=_VNC_PORT + int(matched["display"]))
        yield from _of_port("vnc", matched["host"].strip("[]"), given.get("websocket", ""))


def _of_spice(given: Mapping[str, str]) -> Iterator[Address]:
    if given.get("unix") in ON:
        yield Address("spice", path=given.get("addr", ""))
        return
    for key in ("port", "tls-port"):
        yield from _of_port("spice", given.get("addr", ""), given.get(key, ""))


def _of_network(option: str, value: str) -> Iterator[Address]:
    """Yield the addresses of a network back end: those of its socket, and forwarded ports."""
    given = properties(value, "type")
    for key, text in property_list(value, "type"):
        if re.fullmatch(r"hostfwd(\.\d+\.str)?", key) and (matched := _FORWARD.fullmatch(text)):
            yield from _of_port(option, matched["host"], matched["port"], udp=matched["kind"] == "udp")
    if given.get("type") == "socket":
        yield from _of_text(option, given.get("listen", ""))
        yield from _of_text(option, given.get("localaddr", ""), udp=True)
    elif given.get("type") == "stream" and given.get("server") in ON:
        yield from _of_json_address(option, given, "addr.")
    elif given.get("type") == "dgram" and "remote.type" in given:
        yield from _of_json_address(option, given, "local.", udp=True)


def _of_json_address(option: str, given: Mapping[str, str], prefix: str, *, udp: bool = False) -> Iterator[Address]:
    """Yield the address in QEMU's SocketAddress, whose properties have the given prefix."""
    match given.get(f"{prefix}type"):
        case "unix" if given.get(f"{prefix}abstract") not in ON:
            yield Address(option, path=given.get(f"{prefix}path", ""))
        case "inet" if f"{prefix}to" not in given:
            yield from _of_port(option, given.get(f"{prefix}host", ""), given.get(f"{prefix}port", ""), udp=udp)


def _of_text(option: str, text: str, *, udp: bool = False) -> Iterator[Address]:
    if matched := _HOST_AND_PORT.fullmatch(text):
        yield from _of_port(option, matched["host"].strip("[]"), matched["port"], udp=udp)


def _of_port(option: str, host: str, port: str, *, udp: bool = False) -> Iterator[Address]:
    """Yield an address with a fixed port. QEMU itself reports an invalid port, and chooses one for 0."""
    if port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16:
        yield Address(option, host=host, port=int(port), udp=udp)


def _unix_used(path: str) -> bool:
    """Return whether a process has a socket bound to the path.

    The kernel finds the socket before it compares types. A connection attempt with another type therefore has no effect
    on a process that listens, and fails with EPROTOTYPE. Without such a process, it fails with ECONNREFUSED.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except OSError as failed:
            return failed.errno == errno.EPROTOTYPE
    return True


def _port_used(host: str, port: int, *, udp: bool) -> bool:
    """Return whether a process has bound the port on this address. QEMU itself reports other errors, such as a missing
    permission."""
    kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(host or None, port, type=kind, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return any(_is_bound(family, kind, where) for family, _, _, _, where in found)


def _is_bound(family: int, kind: int, where: tuple[object, ...]) -> bool:
    try:
        with socket.socket(family, kind) as probe:
            if kind == socket.SOCK_STREAM:  # as QEMU does: connections that were closed a moment ago do not count
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(where)
    except OSError as failed:
        return failed.errno == errno.EADDRINUSE
    return False
