"""Tests of peers without certificates: the kernel reports their user.

Only root and the user of the workload are accepted.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageferry.errors import ConnectionLost, UsageError
from pageferry.migration.transport import messages
from pageferry.migration.transport.addresses import Address, resolve
from pageferry.migration.transport.connection import ConnectionListener, connect_control
from tests.kernel import moving, users

pytestmark = pytest.mark.usefixtures("root")

STRANGER = """
import encodings.idna, os, socket, sys
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
kind, where = sys.argv[1].split("=", 1)
if kind == "unix":
    line = socket.socket(socket.AF_UNIX)
    line.connect(where)
else:
    host, _, port = where.rpartition(":")
    line = socket.create_connection((host.strip("[]"), int(port)))
line.settimeout(10)
line.sendall(bytes.fromhex(sys.argv[2]))
print("connected", flush=True)
said = b""
while piece := line.recv(4096):
    said += piece
sys.stdout.buffer.write(said)
"""
"""Program that sends the first message of a source as user 65534, and prints the replies."""

HELLO = messages.Hello(
    version=messages.VERSION,
    migration="0" * 32,
    kind="arena",
    name="stranger",
    details={},
    regions=[messages.RegionInfo(name="arena", length=4096, page_size=4096)],
    streams=1,
    codec="none",
    populate="none",
    keep_large=False,
    mode="precopy",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a directory that every user may enter."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield Path(made)


def stranger(kind: str, where: str) -> subprocess.CompletedProcess[bytes]:
    said = messages.CONTROL_MAGIC + messages.encode(HELLO)
    command = [sys.executable, "-c", STRANGER, f"{kind}={where}", said.hex()]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_another_user_on_loopback_is_refused_before_welcome(host: str) -> None:
    if host == "[::1]" and not Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6")
    with moving.HERE.program(
        "-m", "pageferry", "receive", "there", "--workload", "demo", "--output", "json", "--listen", f"{host}:0"
    ) as there:
        done = stranger("tcp", moving.address_of(there))
        assert done.returncode == 0, done.stderr
        assert b"Welcome" not in done.stdout
        assert b"user 65534" in done.stdout
        assert there.process.poll() is None


def test_another_user_on_a_unix_socket_is_refused_before_welcome(folder: Path) -> None:
    path = folder / "there.sock"
    with moving.receiver("there", "--listen", f"unix:{path}") as there:
        assert moving.address_of(there) == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        refused = stranger("unix", str(path))
        assert b"PermissionError" in refused.stderr
        path.chmod(0o666)  # the peer is refused because of its user, even if the permissions allow the connection
        done = stranger("unix", str(path))
        assert done.returncode == 0, done.stderr
        assert b"Welcome" not in done.stdout
        assert b"user 65534" in done.stdout


@pytest.mark.parametrize("mode", ["precopy", "postcopy"])
def test_workload_is_migrated_over_a_unix_socket(folder: Path, mode: str) -> None:
    path = folder / "there.sock"
    with moving.ledger("here") as here, moving.receiver("there", "--listen", f"unix:{path}") as there:
        with moving.migrating("here", moving.address_of(there), "--mode", mode) as migration:
            assert migration.wait() == 0
        moving.ends_intact(here, "moved")
        moving.is_intact(there)
        assert there.wait() == 0
    assert os.listdir(folder) == []


def test_receiver_listens_on_a_unix_socket_in_its_run_directory_by_default() -> None:
    command = ("-m", "pageferry", "receive", "there", "--workload", "demo", "--output", "json")
    with moving.HERE.program(*command) as there, moving.ledger("here"):
        address = moving.address_of(there)
        assert address == f"unix:{os.environ['PAGEFERRY_RUN_DIR']}/.there.receive"
        with moving.migrating("here", address) as migration:
            assert migration.wait() == 0
        moving.is_intact(there)


def test_recovery_over_a_unix_socket(folder: Path) -> None:
    path = folder / "there.sock"
    with moving.ledger("here") as here, moving.receiver("there", "--listen", f"unix:{path}") as there:
        with moving.migrating("here", moving.address_of(there), fault="source.committed=kill") as migration:
            assert migration.wait() == -9
        with moving.HERE.program("-m", "pageferry", "migrate", "here", "--recover") as recovering:
            assert recovering.wait() == 0
        moving.runs("here")
        moving.ends_intact(here)


def test_peers_of_one_ordinary_user_are_accepted(folder: Path) -> None:
    folder.chmod(0o777)
    host = users.host("user", folder)
    users.python()  # skips
    with moving.ledger("here", host), moving.receiver("there", host=users.host("user", folder / "there")) as there:
        with moving.migrating("here", moving.address_of(there), host=host) as migration:
            assert migration.wait() == 0
        moving.is_intact(there)


def test_source_refuses_a_receiver_of_another_user(folder: Path) -> None:
    """The source runs as root, and a receiver of another user listens at the address."""
    folder.chmod(0o777)
    impostor = users.host("user", folder)
    users.python()  # skips
    with moving.ledger("here") as here, moving.receiver("there", host=impostor) as there:
        with moving.migrating("here", moving.address_of(there), stderr=subprocess.PIPE) as migration:
            _, said = migration.process.communicate(timeout=60)
            assert migration.process.returncode == 27, said
        assert b"user 65534" in said
        assert there.process.poll() is None
        moving.runs("here")
        moving.ends_intact(here)


def test_socket_in_a_directory_writable_by_others_is_refused(folder: Path) -> None:
    folder.chmod(0o777)
    with moving.receiver("there", "--listen", f"unix:{folder}/there.sock", stderr=subprocess.PIPE) as there:
        _, said = there.process.communicate(timeout=60)
        assert there.process.returncode == 2
    assert b"other users can write to it" in said


def test_only_the_socket_of_a_dead_receiver_is_replaced(folder: Path) -> None:
    async def run() -> None:
        address = resolve(f"unix:{folder}/there.sock", insecure=False, what="address")
        first = ConnectionListener(address)
        with pytest.raises(UsageError, match="another process listens there"):
            ConnectionListener(address)
        first._listener.socket.close()  # as if the receiver had been killed
        first._task.cancel()
        second = ConnectionListener(address)
        await second.close()
        assert os.listdir(folder) == []
        (folder / "there.sock").touch()
        with pytest.raises(UsageError, match="other than a socket"):
            ConnectionListener(address)

    asyncio.run(run())


def test_every_address_of_a_name_is_tried_in_order() -> None:
    async def run() -> None:
        connections = ConnectionListener(Address("127.0.0.1", 0))
        try:
            port = connections.address.port
            channel = await connect_control(Address("127.0.0.2", port, "web", ("127.0.0.3", "127.0.0.1")), 5.0)
            assert str(channel.address) == f"127.0.0.1:{port}"
            await channel.close()
        finally:
            await connections.close()

    asyncio.run(run())


def test_error_names_every_address_that_was_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = Address("127.0.0.1", port, "web", ("127.0.0.2", "127.0.0.3"))
    with pytest.raises(ConnectionLost) as caught:
        asyncio.run(connect_control(address, 5.0))
    for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        assert f"{host}:{port}" in str(caught.value)


def test_resolved_name_has_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{number}", 7070)) for number in (3, 1, 3, 2)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    address = resolve("web:7070", insecure=False, what="destination")
    assert [one.host for one in address.each] == ["127.0.0.3", "127.0.0.1", "127.0.0.2"]


def test_unanswered_addresses_take_no_longer_than_the_timeout_together() -> None:
    """The address is listed three times. Its listener does not respond, because the accept queue is full."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
            port = full.getsockname()[1]
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            begin = asyncio.get_running_loop().time()
            with pytest.raises(ConnectionLost, match="timed out"):
                await connect_control(Address("127.0.0.1", port, "web", ("127.0.0.1",) * 3), 2.0)
            assert asyncio.get_running_loop().time() - begin < 3.5
            for filler in fillers:
                filler.close()

    asyncio.run(run())


def test_closed_connection_has_no_user(folder: Path) -> None:
    """A socket in TIME_WAIT has no owner, and must not be attributed to root."""
    from pageferry.migration.transport.peer_users import check_peer

    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        connection, _ = listener.accept()
        assert check_peer(connection, frozenset({0}))
        client.close()
        with connection, pytest.raises(ConnectionResetError, match="closed the connection"):
            check_peer(connection, frozenset({0}))
