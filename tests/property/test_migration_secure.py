"""Tests of control connections under TLS: only messages from the peer are delivered, for any split of the bytes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.errors import AuthenticationError, ConnectionLost, MigrationError, ProtocolError
from pageferry.migration.transport import messages
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.messages import AnyMessage, Message
from pageferry.migration.transport.tls import ControlSession, SecureStream, Trust
from tests.certificates import hosts
from tests.property.test_migration_messages import everything

T = TypeVar("T")
Pair = Callable[[], tuple[ControlSession, ControlSession]]
TIMEOUT = 30.0
tries = settings(max_examples=50)
"""Settings of tests that open a connection for each example."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Yield a function that returns the source's and the receiver's session of a new connection."""
    with tempfile.TemporaryDirectory() as folder:
        source, receiver = hosts(Path(folder) / "hosts")
        here, there = Trust(source, "source"), Trust(receiver, "receiver")
        yield lambda: (here.control_session("127.0.0.1"), there.control_session())


class Sink:
    """Writer that discards its data."""

    def write(self, _: bytes) -> None: ...
    def close(self) -> None: ...
    def is_closing(self) -> bool:
        return False

    async def drain(self) -> None: ...
    async def wait_closed(self) -> None: ...


def established(pair: Pair) -> tuple[ControlSession, ControlSession]:
    source, receiver = pair()
    while not (source.established and receiver.established):
        receiver.feed(source.outgoing())
        source.feed(receiver.outgoing())
    return source, receiver


def sealed(session: ControlSession, *parts: bytes) -> bytes:
    for part in parts:
        session.write(part)
    return session.outgoing()


async def _heard(session: ControlSession, pieces: list[bytes]) -> tuple[list[AnyMessage], MigrationError]:
    reader = asyncio.StreamReader()
    channel = Channel(SecureStream(session, reader, Sink()), Sink(), TIMEOUT)  # type: ignore[arg-type]
    found = []
    for piece in pieces:
        reader.feed_data(piece)
        await asyncio.sleep(0)
    reader.feed_eof()
    try:
        while True:
            found.append(await channel.receive_any())
    except MigrationError as end:
        return found, end
    finally:
        await channel.close()


def heard(session: ControlSession, pieces: list[bytes]) -> tuple[list[AnyMessage], MigrationError]:
    """Return the messages that a channel delivers for chunks of bytes and EOF, and the error that ends the channel."""
    return run(_heard(session, pieces))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a new event loop, and return its result. Check that no task has an unhandled exception."""
    unasked: list[dict[str, Any]] = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda _, context: unasked.append(context))
        result = runner.run(work)
    assert not unasked
    return result


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[early:late] for early, late in itertools.pairwise(edges)]


quiet = everything.filter(lambda message: not isinstance(message, messages.Abort | messages.Alive))
places = st.lists(st.integers(0, 1 << 20), max_size=20)


@tries
@given(said=st.lists(quiet, max_size=4), places=places)
def test_messages_are_delivered_for_any_split_of_the_bytes(pair: Pair, said: list[Message], places: list[int]) -> None:
    source, receiver = established(pair)
    found, end = heard(receiver, cut(sealed(source, *map(messages.encode, said)), places))
    assert found == said
    assert isinstance(end, ConnectionLost)


@tries
@given(said=st.lists(quiet, min_size=1, max_size=4), place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_flipped_bit_ends_the_connection(pair: Pair, said: list[Message], place: int, bit: int) -> None:
    """The receiver delivers no message of the damaged record or of a later record."""
    source, receiver = established(pair)
    data = bytearray(sealed(source, *map(messages.encode, said)))
    data[place % len(data)] ^= 1 << bit
    found, end = heard(receiver, [bytes(data)])
    assert found == said[: len(found)]
    assert len(found) < len(said)
    # If the bit increases the length of a record, the receiver waits for bytes that the source never sends.
    assert isinstance(end, AuthenticationError | ConnectionLost)


@tries
@given(said=st.lists(quiet, min_size=2, max_size=4), data=st.data())
def test_dropped_repeated_or_swapped_records_end_the_connection(pair: Pair, said: list[Message], data: Any) -> None:
    source, receiver = established(pair)
    records = [sealed(source, messages.encode(message)) for message in said]
    order = data.draw(st.lists(st.integers(0, len(said) - 1), min_size=1, max_size=6))
    right = next((n for n, (a, b) in enumerate(itertools.zip_longest(order, range(len(said)))) if a != b), len(said))
    found, end = heard(receiver, [records[number] for number in order])
    assert found == said[:right]
    assert isinstance(end, ConnectionLost if order == list(range(right)) else AuthenticationError)


@tries
@given(garbage=st.binary(min_size=1, max_size=600), places=places)
def test_bytes_that_are_not_records_end_the_connection(pair: Pair, garbage: bytes, places: list[int]) -> None:
    _, receiver = established(pair)
    found, end = heard(receiver, cut(garbage, places))
    assert not found
    assert isinstance(end, AuthenticationError | ConnectionLost)


@tries
@given(body=st.binary(max_size=200), places=places)
def test_bytes_of_authenticated_peer_are_a_message_or_refused(pair: Pair, body: bytes, places: list[int]) -> None:
    """An authenticated peer may send any bytes. The receiver checks them as it checks bytes of a plain connection."""
    source, receiver = established(pair)
    found, end = heard(receiver, cut(sealed(source, len(body).to_bytes(4, "big"), body), places))
    try:
        message = messages.decode(body)
    except msgspec.MsgspecError:
        assert (found, type(end)) == ([], ProtocolError)
    else:
        assert found == [message] or isinstance(message, messages.Abort | messages.Alive)


@tries
@given(length=st.integers(messages.MAX_MESSAGE + 1, (1 << 32) - 1))
def test_length_beyond_the_limit_is_refused_under_tls(pair: Pair, length: int) -> None:
    source, receiver = established(pair)
    found, end = heard(receiver, [sealed(source, length.to_bytes(4, "big"))])
    assert (found, type(end)) == ([], ProtocolError)


@tries
@given(garbage=st.binary(min_size=1, max_size=600), flight=st.integers(0, 2), place=st.integers(0, 1 << 20))
def test_corrupted_handshake_is_refused(pair: Pair, garbage: bytes, flight: int, place: int) -> None:
    """The garbage is in the first flight of the source, in that of the receiver, or in the source's second flight."""
    source, receiver = pair()
    changed = False
    for number, (to, of) in enumerate(((receiver, source), (source, receiver), (receiver, source))):
        data = of.outgoing()
        if number == flight:
            at = place % (len(data) + 1)
            sent, data = data, data[:at] + garbage + data[at + len(garbage) :]
            changed = data != sent
        try:
            to.feed(data)
        except AuthenticationError:
            assert changed
            return
    if source.established and receiver.established and changed:
        # The garbage follows the handshake and is not a valid record.
        victim = source if flight == 1 else receiver
        with contextlib.suppress(AuthenticationError):
            assert victim.read() == b""
