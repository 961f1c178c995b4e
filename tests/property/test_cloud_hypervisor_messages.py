"""Random and invalid messages of Cloud Hypervisor: each is refused with an error, without a large allocation."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pageferry
from pageferry._engine import Mapping, Pager, TargetRegion
from pageferry.images.image import ImageFile
from pageferry.pager import records
from pageferry.pager.cloud_hypervisor.protocol import (
    LIMITS,
    Channel,
    Command,
    InvalidMessage,
    Refused,
    parse_request,
)
from pageferry.pager.cloud_hypervisor.slots import Slot, parse_slots
from tests.kernel.fake_cloud_hypervisor import GIANT, PAGE, config, header, page_fault

PAGES = 256
BASE = 1 << 32
"""Guest physical address of the memory."""

numbers = st.one_of(st.integers(0, 12), st.integers(0, (1 << 16) - 1))
lengths = st.one_of(st.sampled_from([0, 4, 16]), st.integers(0, (1 << 64) - 1))


@contextlib.contextmanager
def connected(sent: bytes, files: int = 0) -> Iterator[Channel]:
    """Return a channel whose peer has sent these bytes, with descriptors, and closed the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if sent:
            socket.send_fds(theirs, [sent], [0] * files)
        theirs.shutdown(socket.SHUT_WR)
        yield Channel(ours)


@given(numbers, st.binary(min_size=6, max_size=6), lengths)
def test_request_is_parsed_or_refused(number: int, further: bytes, length: int) -> None:
    message = struct.pack("<H6sQ", number, further, length)
    known = number in Command.__members__.values()
    limit = LIMITS.get(Command(number), 0) if known else 0
    if known and length <= limit and (number != Command.MEMORY_FD or length == 4):
        assert parse_request(message) == (Command(number), further, length)
    else:
        with pytest.raises(InvalidMessage):
            parse_request(message)


@given(
    st.one_of(st.binary(max_size=200), st.builds(header, numbers, lengths)), st.binary(max_size=40), st.integers(0, 5)
)
def test_receiver_returns_a_request_or_an_error_and_keeps_no_descriptor(head: bytes, tail: bytes, files: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with connected(head + tail, files) as channel:
        try:
            received = channel.receive()
        except InvalidMessage:
            pass
        else:
            assert len(received.payload) <= len(head) + len(tail)
            received.close()
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.binary(max_size=40))
def test_reply_is_accepted_or_refused(reply: bytes) -> None:
    with connected(reply) as channel:
        if reply[:2] == b"\1\0" and len(reply) >= 16 and not any(reply[8:16]):
            channel.request(Command.COMPLETE)
        else:
            with pytest.raises((InvalidMessage, Refused)):
                channel.request(Command.COMPLETE)


slots = st.tuples(
    *[st.integers(0, 3), *[st.one_of(st.integers(0, 8).map(lambda page: page * PAGE), st.integers(-1, 1 << 62))] * 3]
)


@given(st.one_of(st.binary(max_size=100), st.lists(slots, max_size=4).map(config), st.just(b"[" * 100_000)))
def test_slots_are_separate_or_refused(payload: bytes) -> None:
    try:
        found = parse_slots(payload)
    except InvalidMessage:
        return
    assert found
    taken: set[int] = set()
    for slot in found:
        assert isinstance(slot, Slot)
        assert slot.gpa % PAGE == slot.size % PAGE == slot.file_offset % PAGE == 0
        pages = set(range(slot.gpa // PAGE, min((slot.gpa + slot.size) // PAGE, slot.gpa // PAGE + 100)))
        assert not pages & taken
        taken |= pages


# -- requests for pages


@pytest.fixture(scope="module")
def pager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pager, Mapping]]:
    """Return a pager of an image, and its memory."""
    path = tmp_path_factory.mktemp("image") / "image"
    arena = pageferry.Arena(PAGES * PAGE)
    memoryview(arena)[::PAGE] = bytes(page % 3 for page in range(PAGES))
    pageferry.checkpoint(arena, path)
    file, flags = os.memfd_create("memory"), records.create_flags(None, Pager.flags_length(PAGES))
    os.ftruncate(file, PAGES * PAGE)
    mapping = Mapping(file, PAGES * PAGE)
    pager = Pager(ImageFile(path).chain, [TargetRegion(mapping, PAGE)], [], {}, flags, fill="none")
    os.close(file)
    os.close(flags)
    yield pager, mapping
    pager.stop()


def answered(pager: Pager, sent: bytes) -> tuple[list[int], bool | Exception]:
    """Send bytes to a pager. Return the statuses of its replies, and the result or the error."""
    ours, theirs = socket.socketpair()
    replies = bytearray()

    def send() -> None:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)

    def receive() -> None:
        while part := theirs.recv(1 << 16):
            replies.extend(part)

    threads = [threading.Thread(target=send, daemon=True), threading.Thread(target=receive, daemon=True)]
    with ours, theirs:
        for thread in threads:
            thread.start()
        try:
            result: bool | Exception = pager.answer_requests(ours.fileno(), [(BASE, PAGES * PAGE, 0, 0)])
        except OSError as error:
            result = error
        threads[0].join()
        ours.shutdown(socket.SHUT_WR)
        threads[1].join()
    assert len(replies) % 16 == 0
    found = [struct.unpack_from("<H6xQ", replies, at) for at in range(0, len(replies), 16)]
    assert all(length == 0 for _, length in found)
    return [status for status, _ in found], result


@pytest.mark.parametrize(
    ("message", "words", "replies"),
    [
        (page_fault(BASE, PAGE)[:7], "ended within a request", []),
        (page_fault(BASE, PAGE)[:20], "ended within the range", []),
        (page_fault(BASE, PAGE)[:16], "before the range", []),
        (header(99), "unexpected command 99", [2]),
        (header(9, 24) + bytes(24), "has 24 bytes", [2]),
        (page_fault(BASE - PAGE, PAGE), "not memory", [2]),
        (page_fault(BASE + PAGES * PAGE, PAGE), "not memory", [2]),
        (page_fault(BASE, (PAGES + 1) * PAGE), "not memory", [2]),
        (page_fault((1 << 64) - PAGE, PAGE), "not memory", [2]),
        (page_fault(BASE, 0), "whole pages", [2]),
        (page_fault(BASE, 100), "whole pages", [2]),
        (page_fault(BASE + 5, PAGE), "whole pages", [2]),
        (page_fault(BASE, 2 * GIANT), "whole pages", [2]),
        (page_fault(BASE, (1 << 64) - PAGE), "whole pages", [2]),
    ],
)
def test_invalid_request_is_refused(
    pager: tuple[Pager, Mapping], message: bytes, words: str, replies: list[int]
) -> None:
    statuses, result = answered(pager[0], page_fault(BASE, PAGE) + message)
    assert statuses == [1, *replies]
    assert isinstance(result, ConnectionAbortedError)
    assert words in str(result)


def test_many_queued_requests_are_answered_in_order(pager: tuple[Pager, Mapping]) -> None:
    assert answered(pager[0], page_fault(BASE, PAGE) * 100_000) == ([1] * 100_000, False)


def test_abandoned_restore_is_reported(pager: tuple[Pager, Mapping]) -> None:
    assert answered(pager[0], header(Command.ABANDON) + page_fault(0, 0)) == ([1], True)


@given(st.lists(st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)), max_size=20))
def test_valid_requests_make_pages_present(pager: tuple[Pager, Mapping], wanted: list[tuple[int, int]]) -> None:
    valid = [(first, count) for first, count in wanted if count and first + count <= PAGES]
    sent = b"".join(page_fault(BASE + first * PAGE, count * PAGE) for first, count in valid)
    assert answered(pager[0], sent) == ([1] * len(valid), False)
    present = {page for start, end in pager[1].data_ranges() for page in range(start // PAGE, end // PAGE)}
    for first, count in valid:
        assert present >= set(range(first, first + count))  # pages of zeros too
        assert memoryview(pager[1])[first * PAGE] == first % 3


@given(st.lists(st.one_of(st.binary(max_size=40), st.builds(page_fault, lengths, lengths)), max_size=10))
def test_random_bytes_end_the_conversation(pager: tuple[Pager, Mapping], parts: list[bytes]) -> None:
    statuses, result = answered(pager[0], b"".join(parts))
    assert set(statuses) <= {1, 2}
    assert isinstance(result, bool | ConnectionAbortedError)


def test_ranges_outside_of_the_regions_are_refused(pager: tuple[Pager, Mapping]) -> None:
    for wrong in [
        (0, (PAGES + 1) * PAGE, 0, 0),
        (0, PAGE, 1, 0),
        (0, PAGE, 0, PAGES),
        ((1 << 64) - PAGE, PAGE * 2, 0, 0),
    ]:
        with pytest.raises(ConnectionAbortedError, match="not in its region"):
            pager[0].answer_requests(0, [wrong])
