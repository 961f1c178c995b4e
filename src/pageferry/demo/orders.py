"""What the process of a ledger tells its children, and what they answer: one JSON packet each, over a socket pair."""

from __future__ import annotations

from typing import Literal

import msgspec

LARGEST_PACKET = 64 << 10

Verb = Literal["map", "attach", "start", "pause", "resume", "stop", "stalls"]


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to do. A child whose socket is closed ends."""

    verb: Verb
    first_thread: int = 0
    threads: int = 0
    """Of `attach`: the partitions to run."""
    reset: bool = False
    """Of `stalls`."""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """It is done, unless there is an error."""

    error: str | None = None
    tids: list[int] = []
    """Of `start`: the threads that write."""
    longest_stall: int = 0
    """Of `stalls`: ns."""
    stalls: list[int] = []
    """Of `stalls`: how many operations took 2**n up to 2**(n+1) ns."""


_encoder = msgspec.json.Encoder()
_orders = msgspec.json.Decoder(Order)
_answers = msgspec.json.Decoder(Answer)


def encode(packet: Order | Answer) -> bytes:
    """The bytes of a packet."""
    return _encoder.encode(packet)


def decode_order(data: bytes) -> Order:
    """An order from its bytes."""
    return _orders.decode(data)


def decode_answer(data: bytes) -> Answer:
    """An answer from its bytes."""
    return _answers.decode(data)
