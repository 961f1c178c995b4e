"""Peers that send what they must not, against a real receiver and a real source: refused by name, in bounded memory."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pageferry.migration import messages
from pageferry.workloads.lifecycle import Status
from tests.kernel import moving
from tests.kernel.moving import MIB
from tests.kernel.programs import DEADLINE, Program, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("root")]


OPENED: list[socket.socket] = []
"""Sockets of the test that runs."""


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


class Peer:
    """One end of a connection, whose every wait has a deadline."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(DEADLINE)
        OPENED.append(connection)

    @classmethod
    def connect(cls, address: str, magic: bytes = messages.CONTROL_MAGIC) -> Peer:
        host, port = address.split(":")
        peer = cls(socket.create_connection((host, int(port)), DEADLINE))
        peer.write(magic)
        return peer

    def write(self, data: bytes) -> None:
        # The other side may have had enough, and closed.
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def say(self, *said: messages.Message) -> None:
        for message in said:
            self.write(messages.encode(message))

    def say_raw(self, **fields: Any) -> None:
        body = msgspec.msgpack.encode(fields)
        self.write(len(body).to_bytes(4, "big") + body)

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                piece = self.socket.recv(count - len(data))
            except ConnectionError:
                raise EOFError from None
            if not piece:
                raise EOFError
            data += piece
        return data

    def hears(self) -> messages.AnyMessage:
        """The next message that is more than a sign of life. Raises EOFError."""
        while True:
            message = messages.decode(self.read(int.from_bytes(self.read(4), "big")))
            if not isinstance(message, messages.Alive):
                return message

    def is_refused(self) -> str:
        """The reason."""
        answer = self.hears()
        assert isinstance(answer, messages.Abort), answer
        return answer.reason

    def is_closed(self) -> bool:
        """Waits for the end of the connection."""
        try:
            while True:
                self.hears()
        except EOFError:
            return True


def hello(**changes: Any) -> messages.Hello:
    fields: dict[str, Any] = {
        "version": messages.VERSION,
        "migration": secrets.token_hex(16),
        "kind": "arena",
        "name": "stranger",
        "details": {},
        "regions": [messages.RegionInfo(name="arena", length=4 * MIB, page_size=4096)],
        "streams": 1,
        "codec": "none",
        "populate": "none",
        "keep_large": False,
        "mode": "precopy",
    }
    return messages.Hello(**(fields | changes))


def region(length: int) -> list[messages.RegionInfo]:
    return [messages.RegionInfo(name="arena", length=length, page_size=4096)]


@pytest.fixture
def there() -> Iterator[Program]:
    with moving.receiver("there", "--patience", "2") as program:
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


def test_strangers_are_refused_and_a_source_is_received(there: Program, address: str) -> None:
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


REFUSALS: dict[str, Callable[[Peer], None]] = {
    "announced a message of 4294967295 bytes": lambda peer: peer.write(b"\xff" * 64),
    "announced a message of 65537 bytes": lambda peer: peer.write((65537).to_bytes(4, "big")),
    "makes no sense: MessagePack data is malformed": lambda peer: peer.write(b"\0\0\0\4\xc1\xc1\xc1\xc1"),
    "makes no sense: Input data was truncated": lambda peer: peer.write(b"\0\0\0\0"),
    "makes no sense: Invalid value 'Takeover'": lambda peer: peer.say_raw(type="Takeover"),
    "the peer began with Commit": lambda peer: peer.say(messages.Commit()),
    "the peer began with Outcome": lambda peer: peer.say(messages.Outcome(owner="source", complete=False)),
    "version 7": lambda peer: peer.say_raw(**(msgspec.to_builtins(hello()) | {"version": 7, "more": "fields"})),
    "version 8": lambda peer: peer.say(messages.Recover(version=8, migration="0" * 32)),
    "unknown field": lambda peer: peer.say_raw(**msgspec.to_builtins(hello()), more="fields"),
    "are received here": lambda peer: peer.say(hello(regions=region(1 << 48))),
    "$.regions[0].length": lambda peer: peer.say(hello(regions=region((1 << 48) + 4096))),
    "multiple of 4096": lambda peer: peer.say(hello(regions=region(4095))),
    "a workload of kind qemu": lambda peer: peer.say(hello(kind="qemu")),
    "a workload of kind arena": lambda peer: peer.say(hello(regions=region(4096) * 2)),
    "$.streams": lambda peer: peer.say(hello(streams=1000)),
    "$.migration": lambda peer: peer.say(hello(migration="../../../../etc/passwd".ljust(32, "0"))),
    "matching regex": lambda peer: peer.say(hello(migration="0" * 32 + "\n")),
    "$.name": lambda peer: peer.say(hello(name="\x1b[2J")),
    "Invalid value '?[2J'": lambda peer: peer.say_raw(type="\x1b[2J"),
}
"""What a source may not say first, and what it is told."""


def test_a_question_about_a_migration_nobody_knows_decides_nothing(there: Program, address: str) -> None:
    for _ in range(3):
        peer = Peer.connect(address)
        peer.say(messages.Recover(version=messages.VERSION, migration="1" * 32))
        assert peer.hears() == messages.Outcome(owner="unknown", complete=False)
        assert peer.is_closed()
    still_receives(there, address)


def test_the_silent_keep_nobody_waiting(there: Program, address: str) -> None:
    silent = [Peer.connect(address, magic) for magic in (b"", b"PF", messages.CONTROL_MAGIC) for _ in range(10)]
    chatty = Peer.connect(address)
    chatty.say(*[messages.Alive()] * 1000)
    still_receives(there, address)
    assert all(peer.is_closed() for peer in silent)


def test_many_connections_are_turned_away_and_leave_nothing(there: Program, address: str) -> None:
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
        assert "receives another workload" in accepted(address, hello()).is_refused()
    first.say(messages.Abort(reason="enough"))
    assert there.wait() == 21


def accepted(address: str, said: messages.Hello) -> Peer:
    peer = Peer.connect(address)
    peer.say(said)
    return peer


def large_pages(units: bytes = b"\0", number: int = 0) -> messages.LargePages:
    return messages.LargePages(region=number, units=units)


DIGEST = blake2b(digest_size=32).digest()
WRONG: dict[str, tuple[int, list[messages.Message]]] = {
    "LargePages belongs": (22, [messages.Round(number=1)]),
    "large pages of region 3": (22, [large_pages(number=3)]),
    "2 bytes for 2 units": (22, [large_pages(b"\0\0")]),
    "sent Commit during the transfer": (22, [large_pages(), messages.Commit()]),
    "sent Hello during the transfer": (22, [large_pages(), hello()]),
    "region 1 of 1": (22, [large_pages(), messages.Hot(region=1, units=b"")]),
    "was damaged on the way": (22, [large_pages(), messages.StateEnd(length=1, digest=DIGEST)]),
    "the source forgot 1024 pages": (22, [large_pages(), messages.StateEnd(length=0, digest=DIGEST)]),
    "the peer ended the migration: mind?changed": (
        21,
        [large_pages(), messages.Abort(reason="mind\tchanged"), messages.Commit(), messages.Done()],
    ),
}
"""What an accepted source may not say, and how it ends."""


@pytest.mark.parametrize("reason", WRONG)
def test_an_accepted_source_that_breaks_the_rules_ends_the_migration(reason: str, tmp_path: Path) -> None:
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
    command = ("-m", "pageferry", "receive", "there", "--workload", "demo", "--output", "json", "--patience", "2")
    return Program(*command, stderr=stderr)


def open_stream(peer: Peer, welcome: messages.Welcome, index: int = 0) -> Peer:
    stream = Peer(socket.create_connection(peer.socket.getpeername(), DEADLINE))
    stream.write(messages.STREAM_MAGIC + welcome.token + index.to_bytes(4, "big"))
    return stream


@pytest.mark.parametrize("data", [b"\xff" * 4096, b"PFBK" + b"\xff" * 4096, b"PFBK\x01\x01" + bytes(58), b""])
def test_bytes_that_are_no_storage_block_end_the_migration(there: Program, address: str, data: bytes) -> None:
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
def test_a_page_stream_of_a_number_that_is_none_ends_the_migration(there: Program, address: str, index: int) -> None:
    peer = accepted(address, hello())
    welcome = peer.hears()
    assert isinstance(welcome, messages.Welcome)
    open_stream(peer, welcome, index)
    assert f"page stream number {index} of 1" in peer.is_refused()
    assert there.wait() == 22


def test_a_source_that_falls_silent_ends_the_migration(there: Program, address: str) -> None:
    peer = accepted(address, hello())
    assert isinstance(peer.hears(), messages.Welcome)
    assert there.wait() == 23


def test_a_flood_of_large_messages_takes_a_bounded_amount_of_memory(there: Program, address: str) -> None:
    """A receiver that waits for page streams takes up some messages, and lets the rest wait in the network."""
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


# -- a destination that is none


@pytest.fixture(scope="module")
def here() -> Iterator[Program]:
    with moving.ledger("victim") as program:
        yield program


@contextlib.contextmanager
def destination(behave: Callable[[Peer], None]) -> Iterator[str]:
    """A server that treats its first connection as told, and takes in whatever comes over the others."""
    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *arguments: Any) -> None:
        threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        threads[-1].start()

    def serve() -> None:
        with contextlib.suppress(OSError):  # shut down
            start(treat, Peer(listener.accept()[0]))
            while True:
                start(drain, Peer(listener.accept()[0]))

    def treat(peer: Peer) -> None:
        with contextlib.suppress(EOFError, TimeoutError):
            peer.read(len(messages.CONTROL_MAGIC))
            behave(peer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        start(serve)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(DEADLINE)


def drain(peer: Peer) -> None:
    with contextlib.suppress(EOFError, TimeoutError):
        while True:
            peer.read(1 << 16)


def welcomes(peer: Peer) -> None:
    assert isinstance(peer.hears(), messages.Hello)
    peer.say(messages.Welcome(token=bytes(16)))


def accepts(peer: Peer, *answers: messages.Message) -> None:
    """Goes along until the first round, and answers that."""
    welcomes(peer)
    while not isinstance(peer.hears(), messages.Round):
        pass
    peer.say(*answers)


def closes(peer: Peer) -> None:
    peer.socket.shutdown(socket.SHUT_RDWR)


def resets_after_welcome(peer: Peer) -> None:
    welcomes(peer)
    closes(peer)


IMPOSTORS: list[tuple[int, Callable[[Peer], None]]] = [
    (23, closes),
    (23, lambda peer: None),
    (22, lambda peer: peer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
    (22, lambda peer: peer.write((messages.MAX_MESSAGE + 1).to_bytes(4, "big"))),
    (22, lambda peer: peer.write(b"\0\0\0\1\xc1")),
    (22, lambda peer: peer.say_raw(type="Welcome", token=bytes(15))),
    (22, lambda peer: peer.say_raw(type="Welcome", token=bytes(16), version=9)),
    (22, lambda peer: peer.say(messages.Commit())),
    (22, lambda peer: peer.say(messages.RoundDone(number=1))),
    (21, lambda peer: peer.say(messages.Abort(reason="not today"))),
    (23, welcomes),
    (23, resets_after_welcome),
    (22, lambda peer: accepts(peer, messages.Outcome(owner="destination", complete=False))),
    (21, lambda peer: accepts(peer, messages.Abort(reason="disk full"))),
    (22, lambda peer: accepts(peer, *[messages.Running(resume=0.0)] * 100)),
]
"""Destinations that are none, and the exit code of a migration to them."""


@pytest.mark.parametrize("number", range(len(IMPOSTORS)))
def test_a_destination_that_is_none_leaves_the_workload_running(here: Program, number: int) -> None:
    code, behave = IMPOSTORS[number]
    with (
        destination(behave) as address,
        moving.migrating("victim", address, "--patience", "1", "--codec", "zstd") as migration,
    ):
        # An answer that comes before its time is found when its time comes.
        assert migration.wait() == code
    assert moving.status("victim") is Status.RUNNING
    moving.runs("victim")
    assert moving.traces(here.process.pid) == 0


def lives(peer: Peer) -> None:
    """Says Alive, and nothing else, until nobody wants to hear it any more."""
    peer.socket.settimeout(0.2)
    while True:
        peer.say(messages.Alive())
        with contextlib.suppress(TimeoutError):
            peer.read(1)


def goes_along_until(kind: type[messages.Message]) -> Callable[[Peer], None]:
    """A destination that is one, but never answers messages of this kind."""
    answers: dict[type[messages.Message], Callable[[Any], messages.Message]] = {
        messages.Hello: lambda _: messages.Welcome(token=bytes(16)),
        messages.Round: lambda said: messages.RoundDone(number=said.number),
        messages.StateEnd: lambda _: messages.Ready(load=0.0, populate=0.0, populated=NOTHING),
    }

    def behave(peer: Peer) -> None:
        while not isinstance(said := peer.hears(), kind):
            if type(said) in answers:
                peer.say(answers[type(said)](said))
        lives(peer)

    return behave


NOTHING = messages.Populated(large=0, small=0, failed=0, seconds=0.0)


@pytest.mark.parametrize("kind", [messages.Hello, messages.Round, messages.StateEnd])
def test_a_destination_that_only_lives_leaves_the_workload_running(here: Program, kind: type[messages.Message]) -> None:
    with (
        destination(goes_along_until(kind)) as address,
        moving.migrating("victim", address, "--patience", "1") as migration,
    ):
        assert migration.wait() == 23
    moving.runs("victim")
    assert moving.traces(here.process.pid) == 0


def test_a_destination_that_only_lives_after_commit_leaves_it_paused_and_in_doubt() -> None:
    with moving.ledger("doubtful") as doubtful:
        with (
            destination(goes_along_until(messages.Commit)) as address,
            moving.migrating("doubtful", address, "--patience", "1") as migration,
        ):
            assert migration.wait() == 26
        assert moving.status("doubtful") is Status.COMMITTED
        with moving.migrating("doubtful", "--take-back") as back:
            assert back.wait() == 0
        moving.runs("doubtful")
        moving.ends_intact(doubtful)


@pytest.mark.parametrize("begins", [0, 1, 2])
def test_a_source_that_only_lives_ends_the_migration(there: Program, address: str, begins: int) -> None:
    peer = accepted(address, hello())
    welcome = peer.hears()
    assert isinstance(welcome, messages.Welcome)
    open_stream(peer, welcome)
    peer.say(*[large_pages(), messages.State(data=b"state")][:begins])
    with pytest.raises(EOFError):
        lives(peer)
    assert there.wait() == 23


def test_it_was_intact_all_along(here: Program) -> None:
    moving.ends_intact(here)
