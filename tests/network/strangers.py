"""Peers that send what they must not, in the clear or under TLS."""

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

from pageferry.migration import messages
from tests.kernel.moving import MIB
from tests.kernel.programs import DEADLINE

OPENED: list[socket.socket] = []
"""Sockets of the test that runs."""


def close_all() -> None:
    """At the end of a test."""
    while OPENED:
        OPENED.pop().close()


class Peer:
    """One end of a connection, whose every wait has a deadline."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(DEADLINE)
        OPENED.append(connection)

    @classmethod
    def connect(cls, address: str, magic: bytes = messages.CONTROL_MAGIC, tls: Path | None = None) -> Self:
        """To a receiver, and with a folder of certificates under TLS."""
        host, port = address.split(":")
        connection = socket.create_connection((host, int(port)), DEADLINE)
        if tls is not None:
            connection.sendall(messages.SECURE_CONTROL_MAGIC)
            connection = _context(tls, "client").wrap_socket(connection, server_hostname=host)
        peer = cls(connection)
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
    "Invalid value '\\x1b[2J'": lambda peer: peer.say_raw(type="\x1b[2J"),
}
"""What a source may not say first, and what it is told."""


def accepted(address: str, said: messages.Hello, tls: Path | None = None) -> Peer:
    peer = Peer.connect(address, tls=tls)
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
    "the peer ended the migration: mind\\x1bchanged": (
        21,
        [large_pages(), messages.Abort(reason="mind\x1bchanged"), messages.Commit(), messages.Done()],
    ),
}
"""What an accepted source may not say, and how it ends."""


def open_stream(peer: Peer, welcome: messages.Welcome, index: int = 0) -> Peer:
    stream = Peer(socket.create_connection(peer.socket.getpeername(), DEADLINE))
    stream.write(messages.STREAM_MAGIC + welcome.token + index.to_bytes(4, "big"))
    return stream


# -- a destination that is none


@contextlib.contextmanager
def destination(behave: Callable[[Peer], None], tls: Path | None = None) -> Iterator[str]:
    """A server that treats its first connection as told, and takes in whatever comes over the others."""
    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *arguments: Any) -> None:
        threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        threads[-1].start()

    def serve() -> None:
        with contextlib.suppress(OSError):  # shut down
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
