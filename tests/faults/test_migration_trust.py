"""Tests of TLS: only authenticated peers can migrate, and both sides report the reason for a refusal."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pageferry.errors import ConnectionLost, PeerRefused
from pageferry.migration.transport import messages
from pageferry.migration.transport.addresses import Address, resolve
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.connection import PageStream, connect_control, connect_stream
from pageferry.migration.transport.tls import Trust
from pageferry.workloads.lifecycle import Status
from tests.certificates import CLIENT, DAY, SERVER, Authority, hosts
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import DEADLINE, Program, wait_until

pytestmark = pytest.mark.usefixtures("root")

AUTHORITY = Authority()


@pytest.mark.parametrize("options", ["--streams 1", "--streams 4 --codec zstd", "--mode postcopy --streams 2"])
def test_workload_is_migrated_between_authenticated_hosts(tmp_path: Path, options: str) -> None:
    source, destination = hosts(tmp_path)
    with (
        moving.receiver("there", "--tls", str(destination), "--allow", "source.example") as there,
        moving.ledger("here") as here,
    ):
        with moving.migrating("here", moving.address_of(there), "--tls", str(source), *options.split()) as migration:
            assert moving.until(migration, "migration")["status"] == "completed"
            assert migration.wait() == 0
        assert there.json()["type"] == "received"
        moving.ends_intact(here, "moved")
        moving.is_intact(there)
        assert there.wait() == 0


@pytest.mark.parametrize("key", ["RSA", "Ed25519"])
def test_migration_with_certificates_of_each_key_type(tmp_path: Path, key: str) -> None:
    source, destination = hosts(tmp_path, AUTHORITY)
    AUTHORITY.issue(source, "client", "source.example", key=key)
    AUTHORITY.issue(destination, "server", "receiver.example", also=("receiver.example",), key=key)
    with moving.receiver("there", "--tls", str(destination)) as there, moving.ledger("here") as here:
        options = ("--tls", str(source), "--tls-hostname", "receiver.example")
        with moving.migrating("here", moving.address_of(there), *options) as migration:
            assert migration.wait() == 0
        moving.ends_intact(here, "moved")


# -- refused peers


@pytest.fixture(scope="module")
def victim() -> Iterator[Program]:
    with moving.ledger("victim") as program:
        yield program


class Case(NamedTuple):
    """Mistake in certificates or options, and the errors that it causes."""

    code: int
    here: str
    """Text in the source's error."""
    there: str
    """Text in the receiver's error."""
    change: Callable[[Path, Path], object] = lambda source, receiver: None
    source_options: tuple[str, ...] = ()
    receiver_options: tuple[str, ...] = ()


def server(folder: Path, authority: Authority = AUTHORITY, **options: Any) -> None:
    authority.issue(folder, "server", "receiver.example", **({"also": ("127.0.0.1",)} | options))


def client(folder: Path, authority: Authority = AUTHORITY, **options: Any) -> None:
    authority.issue(folder, "client", "source.example", **options)


def revoked(role: str, of: Path, by: Path) -> None:
    AUTHORITY.revoke(by, AUTHORITY.issue(of, role, "revoked", also=("127.0.0.1",)))


CASES = {
    "source of another authority": Case(
        27,
        "(unknown ca): it does not accept our certificate",
        "the certificate of the source is not accepted: unable to get local issuer certificate",
        lambda source, receiver: client(source, Authority("other")),
    ),
    "receiver of another authority": Case(
        27,
        "the certificate of the receiver is not accepted: unable to get local issuer certificate",
        "the source closed the TLS connection (unknown ca)",
        lambda source, receiver: server(receiver, Authority("other")),
    ),
    "source of another authority with the same name": Case(
        27,
        "it does not accept our certificate",
        "the certificate of the source is not accepted",
        lambda source, receiver: client(source, Authority()),
    ),
    "expired source": Case(
        27,
        "our certificate or its ca-crl.pem has expired",
        "the certificate of the source is not accepted: certificate has expired; issue a new one",
        lambda source, receiver: client(source, begins=-2 * DAY, ends=-DAY),
    ),
    "expired receiver": Case(
        27,
        "the certificate of the receiver is not accepted: certificate has expired; issue a new one",
        "the source closed the TLS connection (certificate expired)",
        lambda source, receiver: server(receiver, begins=-2 * DAY, ends=-DAY),
    ),
    "source whose certificate is not valid yet": Case(
        27,
        "it does not accept our certificate",
        "certificate is not yet valid; check the clock",
        lambda source, receiver: client(source, begins=DAY, ends=2 * DAY),
    ),
    "receiver of another name": Case(
        27,
        "give one of its names with --tls-hostname",
        "the source closed the TLS connection (bad certificate)",
        lambda source, receiver: server(receiver, also=("127.0.0.2", "elsewhere.example")),
    ),
    "receiver with only a common name": Case(
        27,
        "Hostname mismatch, certificate is not valid for 'receiver.example'",
        "the source closed the TLS connection (bad certificate)",
        lambda source, receiver: server(receiver, also=()),
        ("--tls-hostname", "receiver.example"),
    ),
    "receiver with a client certificate": Case(
        27,
        "the certificate of the receiver is not accepted: unsuitable certificate purpose",
        "the source closed the TLS connection",
        lambda source, receiver: AUTHORITY.issue(
            receiver, "server", "source.example", also=("127.0.0.1",), purpose=CLIENT
        ),
    ),
    "source with a server certificate": Case(
        27,
        "the receiver closed the TLS connection",
        "the certificate of the source is not accepted: unsuitable certificate purpose",
        lambda source, receiver: client(source, purpose=SERVER),
    ),
    "revoked source": Case(
        27,
        "our certificate has been revoked",
        "the certificate of the source is not accepted: certificate revoked; issue a new one",
        lambda source, receiver: revoked("client", source, receiver),
    ),
    "revoked receiver": Case(
        27,
        "the certificate of the receiver is not accepted: certificate revoked; issue a new one",
        "the source closed the TLS connection (certificate revoked)",
        lambda source, receiver: revoked("server", receiver, source),
    ),
    "expired revocation list": Case(
        27,
        "our certificate or its ca-crl.pem has expired",
        "CRL has expired; fetch a new ca-crl.pem",
        lambda source, receiver: AUTHORITY.revoke(receiver, ends=-DAY / 2),
    ),
    "source that is not allowed": Case(
        21,
        "cannot authorise source.example to send workloads",
        "cannot authorise source.example to send workloads: its certificate has none of the names",
        receiver_options=("--allow", "source.example.org", "--allow", "example", "--allow", "SOURCE.example"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_peer_that_fails_authentication_is_refused_on_both_sides(victim: Program, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    source, receiver = hosts(tmp_path, AUTHORITY)
    case.change(source, receiver)
    with saying(tmp_path, "--tls", str(receiver), *case.receiver_options) as (there, said):
        refused(tmp_path, moving.address_of(there), case, "--tls", str(source), *case.source_options)
        wait_until(lambda: case.there in said.read_text(), f"{case.there!r} in {said.read_text()!r}")
        assert there.process.poll() is None
    still_runs(victim)


def test_tls_on_one_side_only_is_reported_on_both(victim: Program, tmp_path: Path) -> None:
    source, receiver = hosts(tmp_path, AUTHORITY)
    with saying(tmp_path, "--tls", str(receiver)) as (there, said):
        told = Case(21, "this receiver requires TLS: migrate with --tls DIR", "requires TLS")
        refused(tmp_path, moving.address_of(there), told)
        wait_until(lambda: told.there in said.read_text(), "the reason")
    with saying(tmp_path) as (there, said):
        told = Case(27, "it does not use TLS; give --tls on both sides", "start it with --tls DIR")
        refused(tmp_path, moving.address_of(there), told, "--tls", str(source))
        wait_until(lambda: told.there in said.read_text(), "the reason")
    still_runs(victim)


@contextlib.contextmanager
def saying(path: Path, *options: str) -> Iterator[tuple[Program, Path]]:
    """Start a receiver, and yield it with the file that contains its error output."""
    said = path / "receiver.stderr"
    with open(said, "w") as stderr:
        words = (*moving.HERE.listening, *options)
        command = ("-m", "pageferry", "receive", "there", "--workload", "demo", "--output", "json", *words)
        with Program(*command, stderr=stderr) as there:
            yield there, said


def refused(path: Path, address: str, case: Case, *options: str) -> None:
    """Check that a migration of the victim fails with the exit code and error of the case."""
    with (
        open(path / "source.stderr", "w+") as stderr,
        moving.migrating("victim", address, *options, stderr=stderr) as migration,
    ):
        assert migration.wait() == case.code
        stderr.seek(0)
        assert case.here in " ".join(stderr.read().split())


def still_runs(victim: Program) -> None:
    assert moving.status("victim") is Status.RUNNING
    moving.runs("victim")
    assert moving.traces(victim.process.pid) == 0


def test_workload_is_intact_after_all_refusals(victim: Program) -> None:
    moving.ends_intact(victim)


# -- peers that are not pageferry


def greeted(address: str, magic: bytes = messages.SECURE_CONTROL_MAGIC) -> socket.socket:
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)), DEADLINE)
    connection.sendall(magic)
    return connection


def alert(address: str, context: ssl.SSLContext) -> str:
    """Return the reason of the TLS alert with which the receiver ends a connection."""
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with greeted(address) as connection:
        try:
            with context.wrap_socket(connection) as secure:
                secure.sendall(messages.CONTROL_MAGIC)
                secure.recv(1)
        except ssl.SSLError as told:
            return str(told.reason)
    raise AssertionError("the receiver accepted the connection")


def test_clients_without_a_certificate_or_with_an_older_tls_version_are_refused(tmp_path: Path) -> None:
    source, receiver = hosts(tmp_path, AUTHORITY)
    with saying(tmp_path, "--tls", str(receiver)) as (there, said):
        address = moving.address_of(there)
        assert "CERTIFICATE_REQUIRED" in alert(address, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        wait_until(lambda: "it has sent no certificate" in said.read_text(), "the reason")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.load_cert_chain(source / "client-cert.pem", source / "client-key.pem")
        assert "PROTOCOL_VERSION" in alert(address, old)
        wait_until(lambda: "it does not support TLS 1.3" in said.read_text(), "the reason")


def test_receiver_with_an_older_tls_version_is_refused(tmp_path: Path) -> None:
    source, receiver = hosts(tmp_path, AUTHORITY)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.load_cert_chain(receiver / "server-cert.pem", receiver / "server-key.pem")

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(len(messages.SECURE_CONTROL_MAGIC), socket.MSG_WAITALL)
            old.wrap_socket(connection, server_side=True)

    with moving.ledger("here") as here, socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            open(tmp_path / "stderr", "w+") as stderr,
            moving.migrating("here", address, "--tls", str(source), stderr=stderr) as migration,
        ):
            assert migration.wait() == 27
            stderr.seek(0)
            assert "it does not support TLS 1.3" in " ".join(stderr.read().split())
        thread.join(DEADLINE)
        moving.ends_intact(here)


# -- page streams belong to one control connection


def hello(streams: int) -> messages.Hello:
    return messages.Hello(
        version=messages.VERSION,
        migration=secrets.token_hex(16),
        kind="arena",
        name="source",
        details={},
        regions=[messages.RegionInfo(name="arena", length=4 * MIB, page_size=4096)],
        streams=streams,
        codec="none",
        populate="none",
        keep_large=False,
        mode="precopy",
    )


async def control(address: Address, folder: Path) -> Channel:
    return await connect_control(address, DEADLINE, Trust(folder, "source"))


async def is_closed(stream: PageStream) -> bool:
    """Wait until the receiver closes a refused stream, and return True. The receiver sends at most a TLS alert."""
    stream.connection.setblocking(False)
    with stream, contextlib.suppress(ConnectionError):
        async with asyncio.timeout(DEADLINE):
            while await asyncio.get_running_loop().sock_recv(stream.connection, 1 << 16):
                pass
    return True


async def refuses(attempt: Any) -> bool:
    try:
        return await is_closed(await attempt)
    except ConnectionLost:
        return True


async def streams_are_bound(text: str, source: Path, stranger: Path) -> None:
    address = resolve(text, insecure=False, what="receiver")
    ours, theirs = await control(address, source), await control(address, stranger)
    assert await refuses(connect_stream(ours, address, bytes(16), 0)), "before a token was issued"
    await ours.send(hello(streams=2))
    token = (await ours.receive(messages.Welcome)).token
    kept = await connect_stream(ours, address, token, 0)

    assert await refuses(connect_stream(ours, address, secrets.token_bytes(16), 1)), "wrong token"
    assert await refuses(connect_stream(theirs, address, token, 1)), "another certificate"
    theirs.peer = None
    assert await refuses(connect_stream(theirs, address, token, 1)), "unencrypted"

    last = await connect_stream(ours, address, token, 1)
    await ours.send(messages.LargePages(region=0, units=b"\0"))
    await ours.send(messages.Round(number=1))
    assert await refuses(connect_stream(ours, address, token, 0)), "used twice"
    await ours.send(messages.Commit())  # processed only after the round, for which no page was sent
    for stream in (kept, last):
        stream.close()
    with pytest.raises(PeerRefused, match="the peer closed the page stream"):
        await ours.receive(messages.RoundDone)
    await ours.close()
    await theirs.close()


def test_stream_token_is_bound_to_its_peer_and_valid_once(tmp_path: Path) -> None:
    source, receiver = hosts(tmp_path, AUTHORITY)
    (stranger := tmp_path / "stranger").mkdir()
    (stranger / "ca-cert.pem").write_bytes((source / "ca-cert.pem").read_bytes())
    AUTHORITY.issue(stranger, "client", "source.example")
    with saying(tmp_path, "--tls", str(receiver)) as (there, _):
        asyncio.run(streams_are_bound(moving.address_of(there), source, stranger))
        assert there.wait() == 23


# -- recovery with TLS


def test_recovery_requires_tls_after_a_migration_with_tls(tmp_path: Path) -> None:
    """The recovery uses the host name of the migration: the certificate does not contain the address."""
    source, receiver = hosts(tmp_path, AUTHORITY)
    server(receiver, also=("receiver.example",))
    options = ("--tls", str(source), "--tls-hostname", "receiver.example")
    with moving.receiver("there", "--tls", str(receiver)) as there, moving.ledger("here") as here:
        address = moving.address_of(there)
        with moving.migrating("here", address, *options, fault="source.commit-sent=kill") as migration:
            assert migration.wait() == -9
        with moving.migrating("here", "--recover") as plain:
            assert plain.wait() == 26
        with moving.migrating("here", "--recover", "--tls", str(source)) as recovery:
            assert moving.until(recovery, "recovery")["owner"] == "destination"
            assert recovery.wait() == 0
        moving.ends_intact(here, "moved")


def test_lost_postcopy_connection_is_reestablished_with_tls(tmp_path: Path) -> None:
    source, receiver = hosts(tmp_path, AUTHORITY)
    tls = ("--tls", str(source))
    with moving.receiver("there", "--tls", str(receiver)) as there, moving.ledger("here", size=64 * MIB) as here:
        address = moving.address_of(there)
        with moving.migrating("here", address, "--mode", "postcopy", *tls, fault="source.answered=drop") as migration:
            assert migration.wait() == 28
        with moving.migrating("here", "--recover", *tls) as recovery:
            assert moving.until(recovery, "recovery")["owner"] == "destination"
            assert recovery.wait() == 0
        moving.ends_intact(here, "moved")
        moving.is_intact(there)


def test_invalid_combinations_of_tls_options_are_refused(tmp_path: Path) -> None:
    source, receiver = hosts(tmp_path, AUTHORITY)
    with moving.ledger("here"):
        for options in (
            ["--tls", str(source), "--insecure"],
            ["--tls-hostname", "receiver.example"],
            ["--tls", str(receiver)],
            ["--tls", str(tmp_path / "nowhere")],
        ):
            with moving.migrating("here", "127.0.0.1:1", *options) as migration:
                assert migration.wait() == 2
    for options in (["--allow", "source.example"], ["--tls", str(source)]):
        with moving.receiver("there", *options) as there:
            assert there.wait() == 2
