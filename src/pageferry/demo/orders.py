"""Orders that the process of a ledger sends to its children, and the replies of the children. Each message is one
packet of JSON on a socket pair."""

from __future__ import annotations

from typing import Literal

import msgspec

MAX_PACKET = 64 << 10

Verb = Literal["map", "attach", "start", "pause", "resume", "stop", "stalls"]


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Request for one operation of a child."""

    verb: Verb
    first_thread: int = 0
    threads: int = 0
    """Number of partitions to run, for `attach`."""
    reset: bool = False
    """Whether `stalls` clears the durations."""


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Reply to an order. The order was carried out if `error` is None."""

    error: str | None = None
    tids: list[int] = []
    """Kernel thread IDs of the threads, in the reply to `start`."""
    longest_stall: int = 0
    """Duration of the longest operation, ns, in the reply to `stalls`."""
    stalls: list[int] = []
    """Number of operations that took at least 2**n ns and less than 2**(n+1) ns, by n, in the reply to `stalls`."""


_encoder = msgspec.json.Encoder()
_orders = msgspec.json.Decoder(Order)
_replies = msgspec.json.Decoder(Reply)


def encode(packet: Order | Reply) -> bytes:
    """Encode a packet as JSON."""
    return _encoder.encode(packet)


def decode_order(data: bytes) -> Order:
    """Decode an order. Raises msgspec.ValidationError if `data` is not a valid order."""
    return _orders.decode(data)


def decode_reply(data: bytes) -> Reply:
    """Decode a reply. Raises msgspec.ValidationError if `data` is not a valid reply."""
    return _replies.decode(data)
