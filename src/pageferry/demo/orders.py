"""Orders of the process of a ledger to its children, and their answers: one JSON packet each, over a socket pair."""

from __future__ import annotations

from typing import Literal

import msgspec

MAX_PACKET = 64 << 10

Verb = Literal["map", "attach", "start", "pause", "resume", "stop", "stalls"]


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Request for one operation. A child whose socket is closed exits."""

    verb: Verb
    first_thread: int = 0
    threads: int = 0
    """For `attach`: number of partitions to run."""
    reset: bool = False
    """For `stalls`: whether to reset the durations."""


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reply to an order. The order was carried out unless there is an error."""

    error: str | None = None
    tids: list[int] = []
    """For `start`: thread ids of the writing threads."""
    longest_stall: int = 0
    """For `stalls`: longest duration of an operation, ns."""
    stalls: list[int] = []
    """For `stalls`: number of operations that took 2**n up to 2**(n+1) ns, by n."""


_encoder = msgspec.json.Encoder()
_orders = msgspec.json.Decoder(Order)
_answers = msgspec.json.Decoder(Answer)


def encode(packet: Order | Answer) -> bytes:
    """Encode a packet."""
    return _encoder.encode(packet)


def decode_order(data: bytes) -> Order:
    """Decode an order. Raises msgspec.ValidationError if `data` is not a valid order."""
    return _orders.decode(data)


def decode_answer(data: bytes) -> Answer:
    """Decode an answer. Raises msgspec.ValidationError if `data` is not a valid answer."""
    return _answers.decode(data)
