"""Tests of the framing on the control socket: messages round-trip, and oversized or malformed messages are refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import NameInUse, WorkloadDied, WorkloadError
from pageferry.workloads.arena.control_socket import protocol as wire

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def test_requests_and_replies_round_trip(pair: Pair) -> None:
    ours, theirs = pair
    requests: list[wire.Request] = [wire.Describe(), wire.Pause(), wire.LoadState(data=b"x" * 1000, last=True)]
    for request in requests:
        wire.send(ours, request)
    assert [wire.receive_request(theirs) for _ in requests] == requests
    replies: list[wire.Reply] = [wire.Done(), wire.StateReply(data=b"", last=True), wire.FaultsReply(minor=1, major=2)]
    for reply in replies:
        wire.send(theirs, reply)
    assert [wire.receive_reply(ours) for _ in replies] == [(reply, []) for reply in replies]


def test_descriptors_are_passed_with_the_message(pair: Pair) -> None:
    ours, theirs = pair
    file = os.memfd_create("memory")
    wire.send(ours, wire.Done(), (file, file))
    _, descriptors = wire.receive_reply(theirs, 4)
    assert len(descriptors) == 2
    assert {os.fstat(descriptor).st_ino for descriptor in descriptors} == {os.fstat(file).st_ino}
    wire.close_all([*descriptors, file])


def test_closed_connection_is_distinguished_from_an_error(pair: Pair) -> None:
    ours, theirs = pair
    ours.close()
    assert wire.receive_request(theirs) is None
    with pytest.raises(EOFError):
        wire.receive_reply(theirs)


def test_truncated_message_is_a_closed_connection(pair: Pair) -> None:
    ours, theirs = pair
    ours.sendall(b"\0\0\0\x10half")
    ours.close()
    assert wire.receive_request(theirs) is None


def test_oversized_message_is_refused_unread(pair: Pair) -> None:
    ours, theirs = pair
    ours.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="limit"):
        wire.receive_request(theirs)
    with pytest.raises(ValueError, match="limit"):
        wire.send(ours, wire.Refused(error="", reason="x" * (wire.MAX_MESSAGE + 1)))


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(len(garbage).to_bytes(4, "big") + garbage)
        with pytest.raises((msgspec.MsgspecError, ValueError)):
            wire.receive_request(theirs)


@given(st.integers(0, 3), st.integers(-2, 2))
def test_chunks_make_up_the_state(chunks: int, more: int) -> None:
    state = bytes(max(0, chunks * wire.STATE_CHUNK + more))
    pieces = wire.pieces(state)
    assert b"".join(data for data, _ in pieces) == state
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(data) <= wire.STATE_CHUNK for data, _ in pieces)


@pytest.mark.parametrize("error", [WorkloadDied("gone"), NameInUse("taken"), WorkloadError("no")])
def test_refusals_keep_their_class(error: WorkloadError) -> None:
    with pytest.raises(type(error), match=str(error)):
        wire.raise_refusal(wire.refusal(error))


def test_other_errors_become_workload_errors() -> None:
    with pytest.raises(WorkloadError, match="ZeroDivisionError: by zero"):
        wire.raise_refusal(wire.refusal(ZeroDivisionError("by zero")))
