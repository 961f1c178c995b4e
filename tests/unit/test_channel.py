"""Tests of waits for messages on a control connection."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from pageferry.errors import ConnectionLost
from pageferry.migration.transport import channel, messages
from pageferry.migration.transport.channel import Channel

LIMIT = 0.4
"""Seconds to wait for a message, in these tests."""
TIMEOUT = 20.0


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "ANSWER", LIMIT / TIMEOUT)


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[Channel, Channel]]:
    """Yield both ends of a control connection."""
    ends = [
        Channel(*await asyncio.open_unix_connection(sock=connection), timeout=TIMEOUT)
        for connection in socket.socketpair()
    ]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            await end.close()


def later(progress: Callable[[], int]) -> messages.AnyMessage:
    """Return a message that the peer sends after more than twice the limit."""

    async def receive() -> messages.AnyMessage:
        async with pair() as (ours, theirs):
            receiving = asyncio.create_task(ours.receive_any(progress=progress))
            await asyncio.sleep(2.5 * LIMIT)
            await theirs.send(messages.Round(number=7))
            return await receiving

    return asyncio.run(receive())


def test_silent_peer_counts_as_lost_after_the_limit() -> None:
    with pytest.raises(ConnectionLost, match="alive but has not sent the next message"):
        later(lambda: 0)


def test_progress_of_other_connections_extends_the_wait() -> None:
    counter = itertools.count()
    assert later(lambda: next(counter)) == messages.Round(number=7)


def test_progress_that_ends_does_not_extend_the_wait() -> None:
    counter = itertools.chain([0, 1], itertools.repeat(1))
    with pytest.raises(ConnectionLost, match="alive but has not sent"):
        later(lambda: next(counter))


def test_no_keepalives_are_sent_on_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(channel, "KEEPALIVE_INTERVAL", 0.005)

    async def lose() -> None:
        async with pair() as (ours, theirs):
            await theirs.close()
            await asyncio.sleep(0.2)
            assert isinstance(ours.failure, ConnectionLost)

    asyncio.run(lose())
    assert caplog.messages == []
