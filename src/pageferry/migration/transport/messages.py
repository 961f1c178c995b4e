"""Control messages of a migration, and their order.

The messages are sent over one connection, each as a 32-bit length (big endian) and a MessagePack map that contains the
name of the message under `type`. Further connections to the same address carry storage blocks.
`docs/protocol.md` specifies the protocol::

    source                                     destination
      │ ── Hello ───────────────────────────────▶ │  versions, workload, regions, mode
      │ ◀────────────────────────────── Welcome ─ │  token for the page streams   (or Abort: reason)
      │ ══ page streams connect with the token ═▶ │
      │ ── LargePages, one per region ──────────▶ │  2 MiB units that are backed by huge pages (S6)
      │ ── Round 1 ─────────────────────────────▶ │
      │ ══ storage blocks, barrier ═════════════▶ │
      │ ◀──────────────────────────── RoundDone ─ │
      │    ...more rounds; the last ones after the workload has been paused...
      │ ── Hot, one per region ─────────────────▶ │  units modified during the migration (S1)
      │ ── State..., StateEnd ──────────────────▶ │  device state; State may be sent before the last rounds
      │ ◀────────────────────────────── Ready ─── │  everything is received, loaded and populated
      │ ── Commit ──────────────────────────────▶ │  ← from here on, the destination owns the workload
      │ ◀────────────────────────────── Running ─ │
      │ ◀─────────────────────────────── Report ─ │  a second later: faults, huge pages
      │ ── Done ────────────────────────────────▶ │  the source will not ask for the outcome

In a post-copy migration, the workload runs before its pages are received. `Missing` precedes StateEnd, and the pages
follow Running. A source that has lost the link continues over a new one::

      │ ── Missing, one or more per region ─────▶ │  pages that are sent after Running, or on request
      │ ◀═ post-copy streams: requests, pages ══▶ │  from here on: loading the state may need some of them
      │    ...State, Ready, Commit, Running as above...
      │ ══ post-copy streams: all other pages ══▶ │
      │ ◀────────────────────────────── Arrived ─ │  every page is received: the source may discard its copy
      │ ◀──── Report ───── Done ────────────────▶ │

      │ ── Recover ─────────────────────────────▶ │
      │ ◀────────────────────────────── Outcome ─ │  owned by the destination, and not complete
      │ ── Serve ───────────────────────────────▶ │
      │ ◀────────────────────────────── Welcome ─ │  token for new post-copy streams
      │ ◀────── Missing, one or more per region ─ │  pages that are still missing
      │    ...post-copy streams, Arrived, Done as above...

Both sides send `Alive` every second. Until Commit, either side may send `Abort`, which ends the migration and leaves
the workload running at the source. After Commit, only the destination sends it, once it has decided not to run the
workload. A source that has committed and received no reply connects again later and sends `Recover`; the reply is
`Outcome`. Every message is bounded in size, and every wait in time.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pageferry.errors import ProtocolError
from pageferry.memory.bitmaps import pack_units as pack_units
from pageferry.memory.bitmaps import unpack_units as unpack_units

VERSION = 3
"""Protocol version. A peer of another version is rejected with an error that names both versions."""

MAX_MESSAGE = 4 << 20
"""Maximum length of a control message, bytes."""
MAX_DETAIL = 16 << 10
"""Maximum length of a detail in Hello, characters."""
MAX_FIRST = 64 << 10
"""Maximum length of a connection's first message, bytes: bounds the memory used for peers that are not accepted yet."""
MAX_STATE = 512 << 20
"""Maximum length of the device state, bytes."""
STATE_CHUNK = 1 << 20
"""Maximum number of bytes of device state per State message."""
EARLY_STATE = 8 << 20
"""Maximum number of bytes of device state sent before the end of the last round, excluding chunks that are loaded
ahead. The peer queues only a few messages until the end of that round."""
MISSING_CHUNK = 1 << 20
"""Maximum number of bytes of a packed page set per Missing message."""
TOKEN_BYTES = 16
MAX_STREAMS = 16
MAX_DISKS = 64
"""Maximum number of disks that are copied."""
MAX_NOTE = 2048
"""Maximum length of the reason for which a destination shares no base, characters."""
CONTROL_MAGIC = b"PFCTRL1\n"
STREAM_MAGIC = b"PFPAGE1\n"
SECURE_CONTROL_MAGIC = b"PFTLSC1\n"
"""Magic of a control connection with TLS. A TLS handshake follows; inside the session, the plain magic is sent."""
SECURE_STREAM_MAGIC = b"PFTLSP1\n"

Name = Annotated[str, Meta(pattern=r"\A[ -~]{1,256}\Z")]
Detail = Annotated[str, Meta(max_length=MAX_DETAIL)] | int | bool
Count = Annotated[int, Meta(ge=0, le=(1 << 62))]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
"""Time in seconds. NaN and infinity are rejected: the peer could neither compute with them nor print them."""
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
    """Base class of all messages. Unknown fields are rejected."""


class RegionInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory region of the workload at the source."""

    name: Name
    length: Length
    """Length of the region, bytes."""
    page_size: Annotated[int, Meta(ge=4096, le=1 << 30, multiple_of=4096)]
    """Page size of the backing file system, bytes: 4 KiB, or that of hugetlbfs."""


class Hello(Message, frozen=True):
    """Request to migrate a workload: the first message of the source. The reply is Welcome, or Abort with the
    reason."""

    version: Count
    """Protocol version of the source, checked before any other field."""
    migration: Migration
    """Random identifier chosen by the source, 32 hexadecimal digits. `Recover` refers to the migration by this
    identifier."""
    kind: Name
    """Kind of workload, such as `arena`."""
    name: Name
    """Name of the workload at the source."""
    details: Annotated[dict[Name, Detail], Meta(max_length=64)]
    """Configuration of the workload that the destination has to match."""
    regions: Annotated[list[RegionInfo], Meta(min_length=1, max_length=64)]
    streams: Annotated[int, Meta(ge=1, le=MAX_STREAMS)]
    """Number of page streams."""
    codec: Codec
    """Compression of the storage blocks."""
    populate: Populate
    """Page-table entries that the destination populates before Ready."""
    keep_large: bool
    """Whether the destination backs the units of `LargePages` with huge pages."""
    mode: Mode
    """Migration mode. In all modes but `precopy`, post-copy streams are connected and numbered after the page streams.
    The first is for requests and their replies; one per page stream is for all other pages."""


class Welcome(Message, frozen=True, omit_defaults=True):
    """Acceptance of a Hello or Serve, sent by the destination. The page streams (after Serve: post-copy streams)
    follow."""

    token: Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    """Random bytes with which each of these streams begins, so that no other connection is mistaken for a stream."""
    disks: bool = False
    """Whether the destination has compared the disks in Hello with its own. The field is sent only if Hello describes
    disks: older releases do not compare disks, and reject it."""
    copied: Annotated[list[Annotated[int, Meta(ge=0, lt=MAX_DISKS)]], Meta(max_length=MAX_DISKS)] | None = None
    """Indexes of the disks that the destination receives, among the disks with a medium in the record of the source. A
    connection follows for each. The field is sent only if the detail `disks-copied` is set."""
    shares_base: bool = False
    """Whether the workload shares the memory of the image in the detail `base`: absent pages are then pages of that
    image. The field is sent only after a Hello with this detail."""
    base_note: Annotated[str, Meta(max_length=MAX_NOTE)] = ""
    """Reason for which the workload does not share that memory, so that all pages have to be sent; empty if it does.
    The field is sent only after a Hello with the detail `base`."""


class LargePages(Message, frozen=True):
    """Units of a region that are backed by huge pages at the source. The source sends one message per region, in order,
    before round 1."""

    region: RegionNumber
    units: Units
    """Bitmap, one bit per 2 MiB unit, least significant bit first."""


class Round(Message, frozen=True):
    """Start of a round, sent by the source. Storage blocks follow on the page streams, terminated by a barrier on each
    stream. The reply is RoundDone."""

    number: RoundNumber
    """Number of the round, counted from 1."""


class RoundDone(Message, frozen=True):
    """End of a round, sent by the destination when all storage blocks of the round have been verified and placed."""

    number: RoundNumber


class Hot(Message, frozen=True):
    """Units of a region that were modified during the migration. If `populate` is `hot`, the source sends one message
    per region after the last round."""

    region: RegionNumber
    units: Units
    """Bitmap as in `LargePages`."""


class Missing(Message, frozen=True):
    """Chunk of the set of pages of one region that the destination lacks. Regions follow in order. In post-copy, the
    source sends the sets before StateEnd. When a source reconnects, the destination sends them after Welcome."""

    region: RegionNumber
    data: Annotated[bytes, Meta(max_length=MISSING_CHUNK)]
    """Chunk of the packed page set."""
    last: bool
    """Whether this chunk completes the set of the region."""


class State(Message, frozen=True):
    """Chunk of the device state, sent by the source in order. StateEnd follows the last one."""

    data: Annotated[bytes, Meta(min_length=1, max_length=STATE_CHUNK)]
    ahead: bool
    """Whether this chunk may be loaded at once: QEMU sent it while the guest ran, and loading it reads no guest memory.
    Such chunks precede all others."""


class StateEnd(Message, frozen=True):
    """End of the device state, sent by the source. The reply is Ready."""

    length: Annotated[int, Meta(ge=0, le=MAX_STATE)]
    """Number of bytes of device state in all State messages together."""
    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """BLAKE2b-256 digest of the data of all State messages together."""


class Populated(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Page-table entries of the workload's processes that were populated before it resumed."""

    large: Count
    """Number of PMD mappings, each of a huge page."""
    small: Count
    """Number of PTE mappings, each of a base page."""
    failed: Count
    """Number of huge pages that could not be mapped; the first access maps them."""
    seconds: Seconds
    """Time spent by the populating threads; all but `Ready.populate` overlaps the transfer."""


class Ready(Message, frozen=True):
    """Promise of the destination to run the workload if Commit follows. All pages (in post-copy: all that are not
    missing) and the device state are loaded."""

    load: Seconds
    """Seconds spent on loading the device state."""
    populate: Seconds
    """Seconds spent on populating page tables after the last page was received."""
    populated: Populated


class Commit(Message, frozen=True):
    """Transfer of ownership, sent by the source, which never runs the workload on its own afterwards. The reply is
    Running, or Abort if the destination has decided not to run the workload."""


class Running(Message, frozen=True):
    """Confirmation that the workload runs at the destination, sent by the destination after its decision is durable."""

    resume: Seconds
    """Seconds spent on resuming the workload."""


class Arrived(Message, frozen=True):
    """Confirmation that the destination has received every missing page and recorded that durably. The source may then
    discard its copy. The destination sends this message in a post-copy migration, after Running."""

    requests: Count
    """Number of accesses that waited for a page."""
    service: Seconds
    """Total waiting time of these accesses, seconds."""
    longest: Seconds
    """Longest waiting time of an access, seconds."""
    waits: Annotated[list[Count], Meta(max_length=64)]
    """Histogram of the waiting times: bin k counts those of at least 2^(k-1) us and less than 2^k us."""
    seconds: Seconds
    """Seconds from the start of the post-copy phase until all pages were present."""


class Report(Message, frozen=True):
    """Statistics of the destination, sent a second after Running (in post-copy: after Arrived). The reply is Done."""

    minor_faults: Count
    """Number of minor page faults of the workload's threads since it resumed."""
    major_faults: Count
    """Number of major page faults of the workload's threads since it resumed."""
    large_pages: Count
    """Number of huge pages that back the workload's memory."""
    fallbacks: Count
    """Number of huge pages of the source for which the destination had no free huge page."""
    populated: Populated
    units: Annotated[list[Units], Meta(max_length=64)]
    """Units that are backed by huge pages at the destination: one bitmap per region, as in `LargePages`."""


class Done(Message, frozen=True):
    """Acknowledgement that the source knows the outcome and will not send Recover. It is the last message; the
    destination may then delete its records of the migration."""


class Alive(Message, frozen=True):
    """Keepalive, sent by both sides every second."""


class Abort(Message, frozen=True):
    """End of the migration, sent by either side before Commit and by the destination after it. The source owns the
    workload."""

    reason: Annotated[str, Meta(max_length=4096)]
    """Human-readable cause."""


class Recover(Message, frozen=True):
    """Query for the outcome of a migration: the first message of a source on a new connection. The reply is Outcome."""

    version: Count
    """Protocol version of the source."""
    migration: Migration
    """Identifier from `Hello`."""


class Outcome(Message, frozen=True):
    """Reply to Recover: the owner of the workload. An owner other than `unknown` never changes. Serve may follow if the
    destination owns the workload and lacks pages."""

    owner: Owner
    """`unknown` if this host has no record of the migration."""
    complete: bool
    """Whether the destination has received every page. In post-copy, the source may discard its copy only then."""


class Serve(Message, frozen=True):
    """Offer to send the missing pages, sent by the source after an Outcome of `destination` that is not complete. The
    reply is Welcome, followed by Missing."""

    streams: Annotated[int, Meta(ge=1, le=MAX_STREAMS)]
    """Number of post-copy streams, not counting the one for requests."""


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
    """Return the frame of a message: length, then body. Raises ValueError if the body is too long."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"cannot send {type(message).__name__} of {len(body)} bytes: the limit is {MAX_MESSAGE}")
    return len(body).to_bytes(4, "big") + body


def decode(body: bytes) -> AnyMessage:
    """Return the message of this body. Raises msgspec.MsgspecError if it is invalid."""
    return _decoder.decode(body)


def version_of(body: bytes) -> int:
    """Return the version in a message of any version, or our version if it contains none. Other fields are ignored."""
    try:
        return _version_decoder.decode(body).version
    except msgspec.MsgspecError:
        return VERSION


def check_version(version: int) -> None:
    """Raise ProtocolError, with both versions, if `version` is not ours."""
    if version != VERSION:
        raise ProtocolError(
            f"unsupported protocol version {version} of the peer: expected {VERSION}; use the same release of "
            "pageferry on both hosts"
        )
