"""Peers that violate the protocol, with or without TLS."""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import msgspec

from pageferry.migration.transport import messages
from tests.kernel.moving import MIB
from tests.kernel.programs import DEADLINE

OPENED: list[socket.socket] = []
"""Open sockets of the running test."""


def close_all() -> None:
    """Close the sockets of a test."""
    while OPENED:
        OPENED.pop().close()


class Peer:
    """Endpoint of a connection. Each operation has a deadline."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(DEADLINE)
        OPENED.append(connection)

    @classmethod
    def connect(cls, address: str, magic: bytes = messages.CONTROL_MAGIC, tls: Path | None = None) -> Self:
        """Connect to a receiver; `tls` is a directory of certificates, None for plain TCP."""
        host, port = address.split(":")
        connection = socket.create_connection((host, int(port)), DEADLINE)
        if tls is not None:
            connection.sendall(messages.SECURE_CONTROL_MAGIC)
            connection = _context(tls, "client").wrap_socket(connection, server_hostname=host)
        peer = cls(connection)
        peer.write(magic)
        return peer

    def write(self, data: bytes) -> None:
        # The process under test may have closed the connection.
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
        """Return the next message other than Alive. Raises EOFError if the connection is closed."""
        while True:
            message = messages.decode(self.read(int.from_bytes(self.read(4), "big")))
            if not isinstance(message, messages.Alive):
                return message

    def is_refused(self) -> str:
        """Check that the next message is Abort, and return its reason."""
        answer = self.hears()
        assert isinstance(answer, messages.Abort), answer
        return answer.reason

    def is_closed(self) -> bool:
        """Wait until the process under test closes the connection, and return True."""
        try:
            while True:
                self.hears()
        except EOFError:
            return True


def _context(folder: Path, role: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if role == "client" else ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{role}-cert.pem", folder / f"{role}-key.pem")
    context.load_verify_locations(folder / "ca-cert.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


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


REFUSALS: dict[str, Callable[[Peer], None]] = {
    "announced a message of 4294967295 bytes": lambda peer: peer.write(b"\xff" * 64),
    "announced a message of 65537 bytes": lambda peer: peer.write((65537).to_bytes(4, "big")),
    "an invalid message: MessagePack data is malformed": lambda peer: peer.write(b"\0\0\0\4\xc1\xc1\xc1\xc1"),
    "an invalid message: Input data was truncated": lambda peer: peer.write(b"\0\0\0\0"),
    "an invalid message: Invalid value 'Takeover'": lambda peer: peer.say_raw(type="Takeover"),
    "the peer sent Commit as its first message": lambda peer: peer.say(messages.Commit()),
    "the peer sent Outcome as its first message": lambda peer: peer.say(
        messages.Outcome(owner="source", complete=False)
    ),
    "version 7": lambda peer: peer.say_raw(**(msgspec.to_builtins(hello()) | {"version": 7, "more": "fields"})),
    "version 8": lambda peer: peer.say(messages.Recover(version=8, migration="0" * 32)),
    "unknown field": lambda peer: peer.say_raw(**msgspec.to_builtins(hello()), more="fields"),
    "this receiver accepts at most": lambda peer: peer.say(hello(regions=region(1 << 48))),
    "$.regions[0].length": lambda peer: peer.say(hello(regions=region((1 << 48) + 4096))),
    "multiple of 4096": lambda peer: peer.say(hello(regions=region(4095))),
    "its kind is qemu": lambda peer: peer.say(hello(kind="qemu")),
    "its kind is arena": lambda peer: peer.say(hello(regions=region(4096) * 2)),
    "$.streams": lambda peer: peer.say(hello(streams=1000)),
    "$.migration": lambda peer: peer.say(hello(migration="../../../../etc/passwd".ljust(32, "0"))),
    "matching regex": lambda peer: peer.say(hello(migration="0" * 32 + "\n")),
    "$.name": lambda peer: peer.say(hello(name="\x1b[2J")),
    "Invalid value '\\x1b[2J'": lambda peer: peer.say_raw(type="\x1b[2J"),
}
"""Invalid first messages of a source, by the reason with which the receiver refuses them."""


def accepted(address: str, said: messages.Hello, tls: Path | None = None) -> Peer:
    peer = Peer.connect(address, tls=tls)
    peer.say(said)
    return peer


def large_pages(units: bytes = b"\0", number: int = 0) -> messages.LargePages:
    return messages.LargePages(region=number, units=units)


DIGEST = blake2b(digest_size=32).digest()
WRONG: dict[str, tuple[int, list[messages.Message]]] = {
    "instead of LargePages": (22, [messages.Round(number=1)]),
    "huge pages of region 3": (22, [large_pages(number=3)]),
    "invalid bitmap of 2 bytes": (22, [large_pages(b"\0\0")]),
    "sent Commit during the transfer": (22, [large_pages(), messages.Commit()]),
    "sent Hello during the transfer": (22, [large_pages(), hello()]),
    "sent Round during the transfer instead of State or StateEnd": (
        22,
        [large_pages(), messages.Hot(region=0, units=b"\0"), messages.Round(number=1)],
    ),
    "sent Hot during the transfer instead of State or StateEnd": (
        22,
        [large_pages(), *[messages.Hot(region=0, units=b"\0")] * 2],
    ),
    "although it has announced pre-copy": (
        22,
        [large_pages(), messages.Missing(region=0, data=b"", last=True)],
    ),
    "sent LargePages during the transfer": (22, [large_pages(), large_pages()]),
    "Hot of region 1 instead of region 0": (22, [large_pages(), messages.Hot(region=1, units=b"")]),
    "was corrupted in transfer": (22, [large_pages(), messages.StateEnd(length=1, digest=DIGEST)]),
    "the source has not sent 1024 pages": (22, [large_pages(), messages.StateEnd(length=0, digest=DIGEST)]),
    "the peer ended the migration: mind\\x1bchanged": (
        21,
        [large_pages(), messages.Abort(reason="mind\x1bchanged"), messages.Commit(), messages.Done()],
    ),
}
"""Invalid messages of an accepted source, by the reported reason, with the exit code of the receiver."""


def open_stream(peer: Peer, welcome: messages.Welcome, index: int = 0) -> Peer:
    stream = Peer(socket.create_connection(peer.socket.getpeername(), DEADLINE))
    stream.write(messages.STREAM_MAGIC + welcome.token + index.to_bytes(4, "big"))
    return stream


# -- a rogue destination


@contextlib.contextmanager
def destination(behave: Callable[[Peer], None], tls: Path | None = None) -> Iterator[str]:
    """Yield the address of a server. It runs `behave` on its first connection, and discards the data of all others."""
    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *arguments: Any) -> None:
        threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        threads[-1].start()

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is shut down
            start(treat, listener.accept()[0])
            while True:
                start(drain, Peer(listener.accept()[0]))

    def treat(connection: socket.socket) -> None:
        with contextlib.suppress(EOFError, TimeoutError):
            if tls is not None:
                Peer(connection).read(len(messages.SECURE_CONTROL_MAGIC))
                connection = _context(tls, "server").wrap_socket(connection, server_side=True)
            peer = Peer(connection)
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
    """Accept the migration, and reply to its first round with `answers`."""
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
"""Rogue destinations, with the exit code of a migration to each."""


def lives(peer: Peer) -> None:
    """Send only Alive until the process under test closes the connection."""
    peer.socket.settimeout(0.2)
    while True:
        peer.say(messages.Alive())
        with contextlib.suppress(TimeoutError):
            peer.read(1)


def goes_along_until(kind: type[messages.Message]) -> Callable[[Peer], None]:
    """Return a destination that follows the protocol, but sends only Alive after a message of type `kind`."""
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
