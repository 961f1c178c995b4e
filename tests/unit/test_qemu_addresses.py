"""Tests of the addresses on which a QEMU command line listens."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pageferry.errors import AddressInUse, UsageError
from pageferry.workloads.qemu import placeholders
from pageferry.workloads.qemu.addresses import addresses, refuse_repeated, refuse_used

QEMU = "qemu-system-x86_64"


def found(*options: str) -> list[str]:
    return [str(address) for address in addresses([QEMU, *options])]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("-chardev", "socket,id=c,path=/run/a,,b,server=on,wait=off", ["unix:/run/a,b"]),
        ("-chardev", "socket,id=c,path=/run/a,server", ["unix:/run/a"]),
        ("-chardev", "socket,id=c,path=/run/a", []),
        ("-chardev", "socket,id=c,path=/run/a,abstract=on,server=on", []),
        ("-chardev", "socket,id=c,host=::1,port=4000,server=on", ["tcp:[::1]:4000"]),
        ("-chardev", "socket,id=c,port=4000,to=4100,server=on", []),
        ("-chardev", "udp,id=c,port=4000,localport=4001", ["udp::4001"]),
        ("-chardev", "file,id=c,path=/run/a", []),
        ("-serial", "tcp:127.0.0.1:4000,server,nowait", ["tcp:127.0.0.1:4000"]),
        ("-serial", "tcp:127.0.0.1:4000", []),
        ("-serial", "udp:10.0.0.1:5000@:5001", ["udp::5001"]),
        ("-serial", "mon:stdio", []),
        ("-serial", "file:/tmp/tcp:1:2,server=on", []),
        ("-monitor", "telnet:[::1]:4000,server=on,wait=off", ["tcp:[::1]:4000"]),
        ("-qmp", "unix:/run/q.sock,server=on,wait=off", ["unix:/run/q.sock"]),
        ("-qmp", "unix:/run/q.sock,server=off", []),
        ("-gdb", "tcp::1234", ["tcp::1234"]),
        ("-vnc", "127.0.0.1:3,websocket=5703", ["tcp:127.0.0.1:5903", "tcp:127.0.0.1:5703"]),
        ("-vnc", ":1", ["tcp::5901"]),
        ("-vnc", "unix:/run/vnc,password=on", ["unix:/run/vnc"]),
        ("-vnc", "none", []),
        ("-spice", "port=5930,tls-port=5931,addr=::1,image-compression=off", ["tcp:[::1]:5930", "tcp:[::1]:5931"]),
        ("-spice", "unix=on,addr=/run/spice", ["unix:/run/spice"]),
        ("-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-:53", ["tcp:127.0.0.1:2222", "udp::53"]),
        ("-netdev", '{"type":"user","hostfwd":[{"str":"tcp::22-:22"},{"str":":80-:80"}]}', ["tcp::22", "tcp::80"]),
        ("-nic", "user,hostfwd=tcp::2222-10.0.2.15:22", ["tcp::2222"]),
        ("-netdev", "socket,id=n,listen=:4000", ["tcp::4000"]),
        ("-netdev", "socket,id=n,udp=127.0.0.1:4000,localaddr=127.0.0.1:4001", ["udp:127.0.0.1:4001"]),
        ("-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=/run/n", ["unix:/run/n"]),
        ("-netdev", "stream,id=n,addr.type=unix,addr.path=/run/n", []),
        ("-netdev", "dgram,id=n,local.type=inet,local.host=h,local.port=4000,remote.type=inet", ["udp:h:4000"]),
        ("-netdev", "tap,id=n,ifname=tap0", []),
    ],
)
def test_addresses_of_option_are_found(option: str, value: str, expected: list[str]) -> None:
    assert found(option, value) == expected


def test_gdb_port_of_short_option_is_found() -> None:
    assert found("-s", "-m", "1G") == ["tcp::1234"]


@contextmanager
def listening(path: Path, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as server:
        server.bind(str(path))
        if kind == socket.SOCK_STREAM:
            server.listen(1)
        yield server


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_unix_socket_in_use_is_refused_without_a_connection(tmp_path: Path, kind: int) -> None:
    command = [QEMU, "-qmp", f"unix:{tmp_path}/s,server=on,wait=off"]
    refuse_used("web", command)
    with listening(tmp_path / "s", kind) as server:
        with pytest.raises(AddressInUse, match=rf"cannot start web: unix:{tmp_path}/s \(option -qmp\) is in use"):
            refuse_used("web", command)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept() if kind == socket.SOCK_STREAM else server.recv(1)
    assert (tmp_path / "s").is_socket()
    refuse_used("web", command)  # the file of a process that has exited does not count


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_port_in_use_is_refused(kind: int) -> None:
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with socket.socket(socket.AF_INET, kind) as server:
        server.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            server.listen(1)
        port = server.getsockname()[1]
        command = [QEMU, "-nic", f"user,hostfwd={protocol}:127.0.0.1:{port}-:22"]
        with pytest.raises(AddressInUse, match=rf"{protocol}:127.0.0.1:{port} \(option -nic\)"):
            refuse_used("web", command)
        with pytest.raises(AddressInUse):
            refuse_used("web", [QEMU, "-nic", f"user,hostfwd={protocol}::{port}-:22"])
    refuse_used("web", command)


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("-qmp", "unix:/run/q,server=on", "unix:/run/q"),
        ("-vnc", "127.0.0.1:3", "tcp:127.0.0.1:5903"),
        ("-nic", "user,hostfwd=udp::53-:53", "udp::53"),
    ],
)
def test_address_of_two_guests_is_refused_with_their_names(option: str, value: str, shown: str) -> None:
    with pytest.raises(UsageError, match=rf"-{option.strip('-')}: web-1 and web-2 would both listen on {shown};"):
        refuse_repeated([(name, [QEMU, option, value]) for name in ("web-1", "web-2")])


def test_different_spellings_of_a_path_are_one_address() -> None:
    commands = [("a", [QEMU, "-qmp", "unix:/run/q,server"]), ("b", [QEMU, "-vnc", "unix:/run/x/../q"])]
    with pytest.raises(UsageError, match="-vnc: a and b"):
        refuse_repeated(commands)


def test_guests_with_separate_addresses_are_accepted() -> None:
    options = ("-qmp", "unix:/run/q-{name},server=on", "-gdb", "tcp:127.0.0.{n}:1234")
    refuse_repeated(
        (f"web-{n}", placeholders.fill([QEMU, *options], {"name": f"web-{n}", "n": str(n)})) for n in (1, 2)
    )
    # QEMU itself reports an address that is repeated in one command line
    refuse_repeated([("web", [QEMU, "-monitor", "tcp::4000,server", "-serial", "tcp::4000,server"])])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("mac=52:54:00:00:00:{n}", "mac=52:54:00:00:00:7"),
        ('{"driver":"virtio-net-pci","mac":"{n}"}', '{"driver":"virtio-net-pci","mac":"7"}'),
        ('{"a":{"b":{}}}', '{"a":{"b":{}}}'),
        ("{other} {N} {n", "{other} {N} {n"),
        ("{name}-{name}", "web-web"),
    ],
)
def test_placeholders_are_replaced_and_other_braces_kept(word: str, expected: str) -> None:
    assert placeholders.fill([word], {"name": "web", "n": "7"}) == [expected]


def test_value_of_a_placeholder_is_not_replaced_again() -> None:
    assert placeholders.fill(["{name}"], {"name": "{n}", "n": "7"}) == ["{n}"]
