"""Control messages of a migration, and the order in which they go.

One TCP connection carries them, each as a 32-bit length (big endian) and a MessagePack map with the name of the
message under `type`. Further connections to the same port carry storage blocks. `docs/protocol.md` explains it all::

    source                                     destination
      │ ── Hello ───────────────────────────────▶ │  versions, workload, regions, how pages will come
      │ ◀────────────────────────────── Welcome ─ │  token for the page streams   (or Abort: reason)
      │ ══ page streams connect with the token ═▶ │
      │ ── LargePages, one per region ──────────▶ │  which 2 MiB units stand on large pages (S6)
      │ ── Round 1 ─────────────────────────────▶ │
      │ ══ storage blocks, barrier ═════════════▶ │
      │ ◀──────────────────────────── RoundDone ─ │
      │    ...more rounds; the last one after the workload has been paused...
      │ ── Hot, one per region ─────────────────▶ │  units modified during the migration (S1)
      │ ── State..., StateEnd ──────────────────▶ │  what is not memory; State may come during the last round
      │ ◀────────────────────────────── Ready ─── │  everything is here, loaded and populated
      │ ── Commit ──────────────────────────────▶ │  ← from here the workload is the destination's
      │ ◀────────────────────────────── Running ─ │
      │ ◀─────────────────────────────── Report ─ │  a second later: faults, large pages
      │ ── Done ────────────────────────────────▶ │  nobody will ask what became of it

With post-copy the workload runs before its pages are there. Before StateEnd comes `Missing`, and after Running the
pages; a source whose link was lost goes on over a new one::

      │ ── Missing, one or more per region ─────▶ │  pages that come after Running, or when they are asked for
      │ ◀═ late connections: requests, pages ═══▶ │  from here on: loading the state may need some of them
      │    ...State, Ready, Commit, Running as above...
      │ ══ late connections: all other pages ═══▶ │
      │ ◀────────────────────────────── Arrived ─ │  every page is here: the source may forget them
      │ ◀──── Report ───── Done ────────────────▶ │

      │ ── Recover ─────────────────────────────▶ │
      │ ◀────────────────────────────── Outcome ─ │  the destination's, and not complete
      │ ── Serve ───────────────────────────────▶ │
      │ ◀────────────────────────────── Welcome ─ │  token for new late connections
      │ ◀────── Missing, one or more per region ─ │  what is still to come
      │    ...late connections, Arrived, Done as above...

`Alive` goes both ways while something takes long. `Abort` goes both ways until Commit and ends the migration; the
source runs on. After Commit only the destination may send it, once it has decided that it will not run the workload.
A source that has committed and heard nothing asks later, on a new connection, with `Recover`, and is told by `Outcome`.
Every message is bounded in size, and every wait in time.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pageferry.errors import ProtocolError

VERSION = 2
"""Of the protocol. Peers of another version are refused by name."""

MAX_MESSAGE = 4 << 20
"""Largest control message, bytes."""
MAX_FIRST = 64 << 10
"""Largest first message of a source, bytes: until it is accepted it may not make us keep more."""
MAX_STATE = 512 << 20
"""Largest state, bytes."""
STATE_CHUNK = 1 << 20
"""Bytes of state per message."""
EARLY_STATE = 8 << 20
"""Bytes of state that may be sent before the peer turns to them; it queues no more than a few messages."""
MISSING_CHUNK = 1 << 20
"""Bytes of a packed page set per message."""
TOKEN_BYTES = 16
MAX_STREAMS = 16
CONTROL_MAGIC = b"PFCTRL1\n"
STREAM_MAGIC = b"PFPAGE1\n"
SECURE_CONTROL_MAGIC = b"PFTLSC1\n"
"""TLS follows, and in it what otherwise comes first."""
SECURE_STREAM_MAGIC = b"PFTLSP1\n"

Name = Annotated[str, Meta(pattern=r"\A[ -~]{1,256}\Z")]
Detail = Annotated[str, Meta(max_length=16 << 10)] | int | bool
Count = Annotated[int, Meta(ge=0, le=(1 << 62))]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
"""A time. Not a number (NaN) and infinity are refused: arithmetic and output of the peer would fail on them."""
RegionNumber = Annotated[int, Meta(ge=0, lt=64)]
RoundNumber = Annotated[int, Meta(ge=1, lt=1 << 31)]
Units = Annotated[bytes, Meta(max_length=MAX_MESSAGE)]
Length = Annotated[int, Meta(gt=0, le=1 << 48, multiple_of=4096)]
Migration = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
Codec = Literal["none", "lz4", "zstd"]
Populate = Literal["all", "hot", "none"]
Owner = Literal["source", "destination", "unknown"]
Mode = Literal["precopy", "postcopy", "hybrid"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages; a field nobody knows is refused."""


class RegionInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A region as the source has it."""

    name: Name
    length: Length
    page_size: Annotated[int, Meta(ge=4096, le=1 << 30, multiple_of=4096)]


class Hello(Message, frozen=True):
    """What is to come. `version` is looked at before anything else."""

    version: Count
    migration: Migration
    """Chosen at random by the source; names this migration in `Recover`."""
    kind: Name
    name: Name
    details: Annotated[dict[Name, Detail], Meta(max_length=64)]
    regions: Annotated[list[RegionInfo], Meta(min_length=1, max_length=64)]
    streams: Annotated[int, Meta(ge=1, le=MAX_STREAMS)]
    codec: Codec
    populate: Populate
    keep_large: bool
    mode: Mode
    """Unless `precopy`, late connections come with the page streams, numbered after them: one for requests and their
    answers, and as many as there are page streams for everything else."""


class Welcome(Message, frozen=True):
    """Go ahead."""

    token: Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    """First bytes of every page stream, so that nobody else's connection is taken for one."""


class LargePages(Message, frozen=True):
    """Which units of a region stand on large pages at the source: one bit each, the lowest of the first byte first."""

    region: RegionNumber
    units: Units


class Round(Message, frozen=True):
    """Storage blocks follow on the page streams, and a barrier on each."""

    number: RoundNumber


class RoundDone(Message, frozen=True):
    """Everything of the round has been verified and placed."""

    number: RoundNumber


class Hot(Message, frozen=True):
    """Units of a region that were modified during the migration, as in `LargePages`."""

    region: RegionNumber
    units: Units


class Missing(Message, frozen=True):
    """Pages of a region whose contents are not at the destination: a piece of a packed page set, regions in order."""

    region: RegionNumber
    data: Annotated[bytes, Meta(max_length=MISSING_CHUNK)]
    last: bool
    """The set of this region is complete."""


class State(Message, frozen=True):
    """A piece of the state, in order."""

    data: Annotated[bytes, Meta(min_length=1, max_length=STATE_CHUNK)]


class StateEnd(Message, frozen=True):
    """The state is complete."""

    length: Annotated[int, Meta(ge=0, le=MAX_STATE)]
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """BLAKE2b-256 of all of it."""


class Populated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Mappings made in the workload's page tables before it resumed."""

    large: Count
    small: Count
    failed: Count
    """Large pages that were left to the first access."""
    seconds: Seconds
    """Work done for it, mostly hidden in the transfer."""


class Ready(Message, frozen=True):
    """All pages and the state are here; nothing but Commit is missing. Times in seconds."""

    load: Seconds
    """Loading the state."""
    populate: Seconds
    """Populating page tables after the last page came."""
    populated: Populated


class Commit(Message, frozen=True):
    """The workload is yours."""


class Running(Message, frozen=True):
    """It runs here."""

    resume: Seconds
    """Seconds it took to resume."""


class Arrived(Message, frozen=True):
    """Every page that was missing is at the destination, and it has noted so: the source may forget its own."""

    requests: Count
    """Accesses that had to wait for a page."""
    service: Seconds
    """Seconds until they had it, all of them together."""
    longest: Seconds
    """Seconds of the longest."""
    waits: Annotated[list[Count], Meta(max_length=64)]
    """Histogram of them: number k of those that took less than 2^k us, and 2^(k-1) us or more."""
    seconds: Seconds
    """From the first missing page to the last."""


class Report(Message, frozen=True):
    """How it went at the destination."""

    minor_faults: Count
    """Faults of the workload's own threads in the first second after it resumed."""
    major_faults: Count
    large_pages: Count
    fallbacks: Count
    populated: Populated
    units: Annotated[list[Units], Meta(max_length=64)]
    """Which units of each region stand on large pages there, as in `LargePages`."""


class Done(Message, frozen=True):
    """The source knows that the destination runs the workload."""


class Alive(Message, frozen=True):
    """Still at it."""


class Abort(Message, frozen=True):
    """The migration is over; the workload is the source's."""

    reason: Annotated[str, Meta(max_length=4096)]


class Recover(Message, frozen=True):
    """What became of this migration?"""

    version: Count
    migration: Migration


class Outcome(Message, frozen=True):
    """Who owns the workload: once said it never changes."""

    owner: Owner
    complete: bool
    """Whether every page of it has arrived. Only then may a source that owes pages forget them."""


class Serve(Message, frozen=True):
    """The source has the pages that are missing, and wants to go on sending them."""

    streams: Annotated[int, Meta(ge=1, le=MAX_STREAMS)]


AnyMessage = (
    Hello
    | Welcome
    | LargePages
    | Round
    | RoundDone
    | Hot
    | Missing
    | State
    | StateEnd
    | Ready
    | Commit
    | Running
    | Arrived
    | Report
    | Done
    | Alive
    | Abort
    | Recover
    | Outcome
    | Serve
)


class _Versioned(msgspec.Struct):
    version: int = VERSION


_encoder = msgspec.msgpack.Encoder()
_version_decoder = msgspec.msgpack.Decoder(_Versioned)
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """The frame of a message: length, then body."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes, the limit is {MAX_MESSAGE}")
    return len(body).to_bytes(4, "big") + body


def decode(body: bytes) -> AnyMessage:
    """A message from its body. Raises msgspec.MsgspecError for anything that is none."""
    return _decoder.decode(body)


def version_of(body: bytes) -> int:
    """The version that a message of any version speaks of, or ours: its other fields may be unknown to us."""
    try:
        return _version_decoder.decode(body).version
    except msgspec.MsgspecError:
        return VERSION


def check_version(version: int) -> None:
    """Raises ProtocolError, naming both versions, for one that is not ours."""
    if version != VERSION:
        raise ProtocolError(
            f"the peer speaks version {version} of the protocol, and we version {VERSION}: "
            f"use the same release of pageferry on both sides"
        )


def pack_units(units: list[bool]) -> bytes:
    """Bits as in `LargePages`."""
    packed = bytearray((len(units) + 7) // 8)
    for number, unit in enumerate(units):
        packed[number // 8] |= unit << (number % 8)
    return bytes(packed)


def unpack_units(packed: bytes, count: int) -> list[bool]:
    """`count` bits of what `pack_units` made. Raises ValueError when it holds another number of bytes."""
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"{len(packed)} bytes for {count} units")
    return [bool(packed[number // 8] >> (number % 8) & 1) for number in range(count)]
