"""Tests of sets of missing pages as messages: valid sets round-trip, and invalid messages are refused."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry._engine import PageSet
from pageferry.errors import ProtocolError
from pageferry.migration import missing_pages
from pageferry.migration.missing_pages import MissingPages
from pageferry.migration.transport.channel import Channel
from pageferry.migration.transport.messages import MISSING_CHUNK, Missing

regions = st.lists(
    st.integers(1, 5000).flatmap(
        lambda pages: st.tuples(
            st.just(pages), st.lists(st.tuples(st.integers(0, pages), st.integers(0, pages)), max_size=8)
        )
    ),
    min_size=1,
    max_size=4,
)


def made(pages: int, runs: list[tuple[int, int]]) -> PageSet:
    found = PageSet(pages)
    for start, end in runs:
        found.insert(start, end)
    return found


class Recorder:
    """Substitute for a channel that records the messages sent."""

    def __init__(self) -> None:
        self.sent: list[Missing] = []

    async def send(self, message: Missing) -> None:
        self.sent.append(message)


def said(sets: list[PageSet]) -> list[Missing]:
    recorder = Recorder()
    asyncio.run(missing_pages.send_missing(cast("Channel", recorder), sets))
    return recorder.sent


@given(regions)
def test_missing_sets_round_trip(described: list[tuple[int, list[tuple[int, int]]]]) -> None:
    sets = [made(pages, runs) for pages, runs in described]
    heard = MissingPages([pages for pages, _ in described])
    for message in said(sets):
        assert not heard.complete
        heard.add(message)
    assert heard.complete
    assert [one.runs() for one in heard.sets] == [one.runs() for one in sets]


def test_large_set_is_sent_in_chunks() -> None:
    """The set contains one or two of every four pages of 64 GiB, at random positions, so it hardly compresses."""
    pages = 1 << 24
    scattered = PageSet(pages)
    state = 1
    for start in range(0, pages, 4):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        scattered.insert(start + (state >> 62), start + (state >> 62) + 1 + (state >> 61 & 1))
    pieces = said([scattered])
    assert len(pieces) > 1
    assert all(len(piece.data) <= MISSING_CHUNK for piece in pieces)
    heard = MissingPages([pages])
    for piece in pieces:
        heard.add(piece)
    (found,) = heard.sets
    found.subtract(scattered)
    assert not found


def test_out_of_order_regions_are_refused() -> None:
    (message,) = said([made(100, [(3, 5)])])
    heard = MissingPages([100, 100])
    with pytest.raises(ProtocolError, match="region 1"):
        heard.add(Missing(region=1, data=message.data, last=True))
    heard.add(message)
    with pytest.raises(ProtocolError, match="region 0"):
        heard.add(message)
    heard.add(Missing(region=1, data=message.data, last=True))
    with pytest.raises(ProtocolError, match="after 2 regions"):
        heard.add(message)


def test_oversized_set_is_refused_before_it_is_stored() -> None:
    heard = MissingPages([100])
    heard.add(Missing(region=0, data=bytes(200), last=False))
    with pytest.raises(ProtocolError, match="in more than"):
        heard.add(Missing(region=0, data=bytes(200), last=False))


@given(st.binary(max_size=200))
def test_random_bytes_are_a_set_or_refused(data: bytes) -> None:
    heard = MissingPages([1000])
    try:
        heard.add(Missing(region=0, data=data, last=True))
    except ProtocolError:
        assert not heard.sets
    else:
        assert heard.sets[0].pages == 1000
