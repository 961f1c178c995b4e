"""Tests of the parser of Firecracker's handshake, with recorded messages and arbitrary ones."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.pager.firecracker.handshake import (
    MAX_MAPPINGS,
    Incomplete,
    InvalidHandshake,
    Receiver,
    parse,
)
from tests.kernel import fake_firecracker

RECORDED = (
    b'[{"base_host_virt_addr":140183892656128,"size":134217728,"offset":0,"page_size":4096,"page_size_kib":4096}]'
)
"""Message of Firecracker 1.17 for a microVM of 128 MiB."""
GIB = 1 << 30


def mapping(address: int, size: int, offset: int, **more: Any) -> dict[str, Any]:
    """Return a mapping as in a message."""
    return {"base_host_virt_addr": address, "size": size, "offset": offset, **more}


def test_recorded_message_is_parsed() -> None:
    layout = parse(RECORDED)
    assert (layout.length, layout.page_size) == (128 << 20, 4096)
    assert [(one.base_host_virt_addr, one.size, one.offset) for one in layout.mappings] == [
        (140183892656128, 128 << 20, 0)
    ]


def test_fake_sends_the_recorded_message() -> None:
    sent = fake_firecracker.message([(140183892656128, 134217728, 0)], 4096, (1, 17))
    assert json.dumps(sent, separators=(",", ":")).encode() == RECORDED


@pytest.mark.parametrize(
    ("version", "page_size"), [((1, 1), 4096), ((1, 7), 4096), ((1, 7), 2 << 20), ((1, 12), 2 << 20)]
)
def test_page_size_of_every_version_is_read(version: tuple[int, int], page_size: int) -> None:
    sent = fake_firecracker.message([(1 << 40, 2 * GIB, 0)], page_size, version)
    assert parse(json.dumps(sent).encode()).page_size == page_size


def test_memory_above_the_gap_may_be_at_a_lower_address() -> None:
    both = [mapping(0x7F2000000000, 3 * GIB, 0), mapping(0x7F1000000000, GIB, 3 * GIB)]
    assert parse(json.dumps(both).encode()).length == 4 * GIB


@pytest.mark.parametrize(
    ("mappings", "cause"),
    [
        ([], "there are 0"),
        ([mapping(4096 * n, 4096, 4096 * n) for n in range(MAX_MAPPINGS + 1)], f"there are {MAX_MAPPINGS + 1}"),
        ([mapping(1 << 40, 4095, 0)], "size 4095 is not a multiple"),
        ([mapping((1 << 40) + 1, 4096, 0)], "base_host_virt_addr"),
        ([mapping(1 << 40, 4096, 0, page_size=2 << 20)], "size 4096 is not a multiple of the page size 2097152"),
        ([mapping(1 << 40, GIB, 0, page_size=GIB)], "unsupported page size 1073741824"),
        ([mapping(1 << 40, 4096, 0, page_size=0)], "unsupported page size 0"),
        ([mapping(0, 4096, 0), mapping(4096, 2 << 20, 4096, page_size=2 << 20)], "unsupported page size 4096, 2097152"),
        ([mapping(0, 8192, 0), mapping(4096, 4096, 8192)], "two of them contain address 4096"),
        ([mapping(0, 8192, 0), mapping(8192, 4096, 4096)], "two of them contain offset 4096"),
        ([mapping(0, 4096, 0), mapping(8192, 4096, 8192)], "no mapping of offset 4096"),
        ([mapping(0, 4096, 4096)], "no mapping of offset 0"),
        ([mapping((1 << 56) - 4096, 8192, 0)], "8192 bytes at address"),
        ([mapping(1 << 40, -4096, 0)], "expected `int` >= 1|Expected `int`"),
        ([mapping(1 << 40, 4096, 0, is_guest_memfd=True)], "guest_memfd"),
        ({"size": 4096}, "array"),
    ],
)
def test_invalid_memory_is_refused_with_the_cause(mappings: Any, cause: str) -> None:
    with pytest.raises(InvalidHandshake, match=cause):
        parse(json.dumps(mappings).encode())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(message: bytes) -> None:
    with pytest.raises(InvalidHandshake):
        parse(message)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["base_host_virt_addr", "size", "offset", "page_size", "page_size_kib", "x"]),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(_json)
def test_arbitrary_json_never_ends_in_another_error(message: Any) -> None:
    try:
        layout = parse(json.dumps(message).encode())
    except InvalidHandshake:
        return
    assert 0 < layout.length < 1 << 57


@st.composite
def layouts(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Return a valid layout: mappings of consecutive offsets at separate addresses, both in any order."""
    page = draw(st.sampled_from([4096, 2 << 20]))
    sizes = [size * page for size in draw(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=4))]
    addresses, at = {}, 0
    for number in draw(st.permutations(range(len(sizes)))):
        at += draw(st.integers(0, 1 << 20)) * page
        addresses[number] = at
        at += sizes[number]
    mappings = [(addresses[number], size, sum(sizes[:number])) for number, size in enumerate(sizes)]
    version = draw(st.sampled_from([(1, 7), (1, 12)]))
    return draw(st.permutations(fake_firecracker.message(mappings, page, version)))


@given(layouts(), st.data())
def test_valid_layouts_are_accepted_whole_and_incomplete_in_part(
    fields: list[dict[str, Any]], data: st.DataObject
) -> None:
    message = json.dumps(fields).encode()
    layout = parse(message)
    assert [one.size for one in layout.mappings] == [one["size"] for one in fields]
    with pytest.raises(Incomplete):
        parse(message[: data.draw(st.integers(0, len(message) - 1))])


async def _receive(parts: list[bytes], descriptors: list[int], close: bool = True) -> Any:
    """Send parts over a socket, the descriptors with the last one, and receive the handshake."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        receiving = asyncio.ensure_future(Receiver(ours).receive())
        for part in parts[:-1]:
            theirs.sendall(part)
            await asyncio.sleep(0)
        socket.send_fds(theirs, parts[-1:], descriptors)
        if close:
            theirs.shutdown(socket.SHUT_WR)
        return await receiving


def _open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@given(st.lists(st.integers(1, len(RECORDED) - 1), max_size=5), st.integers(0, 4))
def test_message_may_arrive_in_parts_but_not_without_userfaultfd(cuts: list[int], count: int) -> None:
    """The descriptors are of a pipe: everything is received, and then refused, and nothing is left open."""
    borders = [0, *sorted(set(cuts)), len(RECORDED)]
    parts = [RECORDED[start:end] for start, end in itertools.pairwise(borders)]
    reading, writing = os.pipe()
    try:
        before = _open_descriptors()
        cause = {0: "no descriptor", 4: "more than 3 descriptors"}.get(count, "not a userfaultfd")
        with pytest.raises(InvalidHandshake, match=cause):
            asyncio.run(_receive(parts, [reading] * count))
        assert _open_descriptors() == before
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("length", range(0, len(RECORDED), 20))
def test_truncated_message_is_refused(length: int) -> None:
    with pytest.raises(InvalidHandshake, match=f"ended after {length} bytes"):
        asyncio.run(_receive([RECORDED[:length]], []))


def test_endless_message_is_refused() -> None:
    async def flood() -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for end in (ours, theirs):
                end.setblocking(False)
            receiving = asyncio.ensure_future(Receiver(ours).receive())
            theirs.send(b"[")
            while not receiving.done():
                with contextlib.suppress(BlockingIOError):
                    theirs.send(b" " * 4096)
                await asyncio.sleep(0)
            with pytest.raises(InvalidHandshake, match="more than 262144 bytes"):
                await receiving

    asyncio.run(flood())
