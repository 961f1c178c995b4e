"""Tests of malformed and malicious messages to a receiver and a source, which refuse them in bounded memory."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pageferry.host.registry import Registry
from pageferry.migration.ownership import CommitDecision, CommitDecisions
from pageferry.migration.transport import messages
from pageferry.workloads.lifecycle import Status
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import DEADLINE, Program, wait_until
from tests.network.strangers import (
    IMPOSTORS,
    REFUSALS,
    WRONG,
    Peer,
    accepted,
    close_all,
    destination,
    goes_along_until,
    hello,
    large_pages,
    lives,
    open_stream,
)

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture
def there() -> Iterator[Program]:
    with moving.receiver("there", "--timeout", "2") as program:
        yield program


@pytest.fixture
def address(there: Program) -> str:
    return moving.address_of(there)


def still_receives(there: Program, address: str) -> None:
    with moving.ledger("here") as here:
        with moving.migrating("here", address) as migration:
            assert migration.wait() == 0
        assert there.json()["type"] == "received"
        moving.ends_intact(here, "moved")


def test_malformed_connections_are_refused_and_a_source_is_received(there: Program, address: str) -> None:
    for magic in (b"GET / HTTP/1.1\r\n\r\n", bytes(8), b"PFCTRL2\n", secrets.token_bytes(1 << 16)):
        assert Peer.connect(address, magic).is_closed()
    for token in (secrets.token_bytes(16), bytes(16)):
        assert Peer.connect(address, messages.STREAM_MAGIC + token + bytes(4)).is_closed()
    for index, (reason, say) in enumerate(REFUSALS.items()):
        peer = Peer.connect(address)
        say(peer)
        assert reason in peer.is_refused(), index
        assert peer.is_closed()
    still_receives(there, address)


def test_recover_request_for_an_unknown_migration_decides_nothing(there: Program, address: str) -> None:
    for _ in range(3):
        peer = Peer.connect(address)
        peer.say(messages.Recover(version=messages.VERSION, migration="1" * 32))
        assert peer.hears() == messages.Outcome(owner="unknown", complete=False)
        assert peer.is_closed()
    still_receives(there, address)


def decided(migration: str) -> CommitDecisions:
    """Record that this host has committed an earlier migration, and has not received all of its pages.

    Return the decisions of this host.
    """
    decisions = CommitDecisions(Registry().path)
    decisions.begin(migration)
    assert decisions.decide(migration, CommitDecision.COMMITTED) is CommitDecision.COMMITTED
    return decisions


def test_source_of_an_old_migration_does_not_block_the_receiver(there: Program, address: str) -> None:
    number = secrets.token_hex(16)
    decided(number)
    old = [Peer.connect(address) for _ in range(12)]
    for peer in old:
        peer.say(messages.Recover(version=messages.VERSION, migration=number))
        assert peer.hears() == messages.Outcome(owner="destination", complete=False)
        begin = time.monotonic()
        first = Peer.connect(address)
        first.say(messages.Recover(version=messages.VERSION, migration="1" * 32))
        assert first.hears() == messages.Outcome(owner="unknown", complete=False)
        assert time.monotonic() - begin < 3, "the receiver replied to the old source first"
    still_receives(there, address)


@pytest.mark.parametrize("owner", ["destination", "source"])
def test_reused_migration_id_is_refused_and_its_decision_is_kept(
    there: Program, address: str, owner: messages.Owner
) -> None:
    number = secrets.token_hex(16)
    decisions = CommitDecisions(Registry().path)
    decisions.begin(number)
    decisions.decide(number, CommitDecision.COMMITTED if owner == "destination" else CommitDecision.ABORTED)
    again = accepted(address, msgspec.structs.replace(hello(), migration=number))
    answer = again.hears()
    if isinstance(answer, messages.Welcome):  # accepted as a new migration
        again.say(messages.Abort(reason="enough"))
        assert there.wait() == 21
        assert decisions.knows(number), "the decision is forgotten"
    assert isinstance(answer, messages.Abort)
    assert "has already used the id" in answer.reason
    asking = Peer.connect(address)
    asking.say(messages.Recover(version=messages.VERSION, migration=number))
    assert asking.hears() == messages.Outcome(owner=owner, complete=False)
    still_receives(there, address)


def test_silent_connections_do_not_delay_a_source(there: Program, address: str) -> None:
    silent = [Peer.connect(address, magic) for magic in (b"", b"PF", messages.CONTROL_MAGIC) for _ in range(10)]
    chatty = Peer.connect(address)
    chatty.say(*[messages.Alive()] * 1000)
    still_receives(there, address)
    assert all(peer.is_closed() for peer in silent)


def test_many_connections_are_refused_and_closed(there: Program, address: str) -> None:
    pid = there.process.pid
    before = moving.descriptors(pid)
    crowd = [Peer.connect(address, b"") for _ in range(400)]
    assert len(moving.descriptors(pid)) < len(before) + 100
    assert all(peer.is_closed() for peer in crowd)
    wait_until(lambda: moving.descriptors(pid) == before, "the end of all connections")
    still_receives(there, address)


def test_another_source_is_refused_while_one_is_received(there: Program, address: str) -> None:
    first = Peer.connect(address)
    first.say(hello())
    assert isinstance(first.hears(), messages.Welcome)
    for _ in range(20):
        assert "has accepted another workload" in accepted(address, hello()).is_refused()
    first.say(messages.Abort(reason="enough"))
    assert there.wait() == 21


@pytest.mark.parametrize("reason", WRONG)
def test_protocol_violation_of_an_accepted_source_ends_the_migration(reason: str, tmp_path: Path) -> None:
    code, said = WRONG[reason]
    with open(tmp_path / "stderr", "w+") as stderr, receiver_saying(stderr) as there:
        peer = accepted(moving.address_of(there), hello())
        welcome = peer.hears()
        assert isinstance(welcome, messages.Welcome)
        stream = open_stream(peer, welcome)
        peer.say(*said)
        assert there.wait() == code
        assert stream.is_closed()
        stderr.seek(0)
        assert reason in stderr.read()


def receiver_saying(stderr: Any) -> Program:
    words = (*moving.HERE.listening, "--timeout", "2")
    command = ("-m", "pageferry", "receive", "there", "--workload", "demo", "--output", "json", *words)
    return Program(*command, stderr=stderr)


@pytest.mark.parametrize("data", [b"\xff" * 4096, b"PFBK" + b"\xff" * 4096, b"PFBK\x01\x01" + bytes(58), b""])
def test_malformed_storage_block_ends_the_migration(there: Program, address: str, data: bytes) -> None:
    peer = accepted(address, hello())
    welcome = peer.hears()
    assert isinstance(welcome, messages.Welcome)
    stream = open_stream(peer, welcome)
    peer.say(large_pages(), messages.Round(number=1))
    stream.write(data)
    stream.socket.shutdown(socket.SHUT_WR)
    reason = peer.is_refused()
    assert ("storage block" in reason) == bool(data)
    assert there.wait() == (22 if data else 23)


@pytest.mark.parametrize("index", [1, 1 << 31])
def test_invalid_page_stream_number_ends_the_migration(there: Program, address: str, index: int) -> None:
    peer = accepted(address, hello())
    welcome = peer.hears()
    assert isinstance(welcome, messages.Welcome)
    open_stream(peer, welcome, index)
    assert f"page stream number {index} of 1" in peer.is_refused()
    assert there.wait() == 22


def test_silent_source_ends_the_migration(there: Program, address: str) -> None:
    peer = accepted(address, hello())
    assert isinstance(peer.hears(), messages.Welcome)
    assert there.wait() == 23


def test_flood_of_large_messages_uses_bounded_memory(there: Program, address: str) -> None:
    """The receiver reads a bounded number of messages while it waits for page streams."""
    peer = accepted(address, hello())
    assert isinstance(peer.hears(), messages.Welcome)
    before = resident(there)
    frame = messages.encode(large_pages(bytes(messages.MAX_MESSAGE - 64)))
    flood = threading.Thread(target=peer.write, args=(frame * 100,), daemon=True)
    flood.start()
    most = before
    while there.process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            most = max(most, resident(there))
        time.sleep(0.02)
    assert there.wait() == 23
    assert most - before < 150 * MIB
    peer.socket.close()
    flood.join(DEADLINE)


def resident(program: Program) -> int:
    status = Path(f"/proc/{program.process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmRSS:"))) << 10


# -- a rogue destination


@pytest.fixture(scope="module")
def here() -> Iterator[Program]:
    with moving.ledger("victim") as program:
        yield program


@pytest.mark.parametrize("number", range(len(IMPOSTORS)))
def test_rogue_destination_leaves_the_workload_running(here: Program, number: int) -> None:
    code, behave = IMPOSTORS[number]
    with (
        destination(behave) as address,
        moving.migrating("victim", address, "--timeout", "1", "--codec", "zstd") as migration,
    ):
        # The source reads a premature reply only when it expects a reply.
        assert migration.wait() == code
    assert moving.status("victim") is Status.RUNNING
    moving.runs("victim")
    assert moving.traces(here.process.pid) == 0


@pytest.mark.parametrize("kind", [messages.Hello, messages.Round, messages.StateEnd])
def test_destination_that_sends_only_alive_leaves_the_workload_running(
    here: Program, kind: type[messages.Message]
) -> None:
    with (
        destination(goes_along_until(kind)) as address,
        moving.migrating("victim", address, "--timeout", "1") as migration,
    ):
        assert migration.wait() == 23
    moving.runs("victim")
    assert moving.traces(here.process.pid) == 0


def test_destination_that_sends_only_alive_after_commit_leaves_a_pending_recovery() -> None:
    with moving.ledger("doubtful") as doubtful:
        with (
            destination(goes_along_until(messages.Commit)) as address,
            moving.migrating("doubtful", address, "--timeout", "1") as migration,
        ):
            assert migration.wait() == 26
        assert moving.status("doubtful") is Status.COMMITTED
        with moving.migrating("doubtful", "--take-back") as back:
            assert back.wait() == 0
        moving.runs("doubtful")
        moving.ends_intact(doubtful)


@pytest.mark.parametrize("begins", [0, 1, 2])
def test_source_that_sends_only_alive_ends_the_migration(there: Program, address: str, begins: int) -> None:
    peer = accepted(address, hello())
    welcome = peer.hears()
    assert isinstance(welcome, messages.Welcome)
    open_stream(peer, welcome)
    peer.say(*[large_pages(), messages.State(data=b"state", ahead=False)][:begins])
    with pytest.raises(EOFError):
        lives(peer)
    assert there.wait() == 23


def test_workload_is_intact_after_all_refusals(here: Program) -> None:
    moving.ends_intact(here)
