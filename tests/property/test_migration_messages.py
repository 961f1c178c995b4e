"""Tests of messages and unit maps: valid values round-trip, and invalid bytes are refused."""

from __future__ import annotations

from typing import Any, cast, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import ProtocolError
from pageferry.migration.transport import messages
from pageferry.migration.transport.messages import AnyMessage, Message

KINDS: list[type[Message]] = list(get_args(AnyMessage))

counts = st.integers(0, 1 << 62)
numbers = st.integers(0, 63)
seconds = st.floats(0, 1e6)
migrations = st.text("0123456789abcdef", min_size=32, max_size=32)
names = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=256)
regions = st.builds(
    messages.RegionInfo,
    name=names,
    length=st.integers(1, 1 << 36).map(lambda pages: pages * 4096),
    page_size=st.integers(1, 1 << 18).map(lambda pages: pages * 4096),
)
populated = st.builds(messages.Populated, large=counts, small=counts, failed=counts, seconds=seconds)
FIELDS: dict[type[Message], dict[str, st.SearchStrategy[Any]]] = {
    messages.Hello: {
        "version": counts,
        "migration": migrations,
        "kind": names,
        "name": names,
        "details": st.dictionaries(names, names | st.integers(-(1 << 63), (1 << 63) - 1) | st.booleans(), max_size=8),
        "regions": st.lists(regions, min_size=1, max_size=64),
        "streams": st.integers(1, messages.MAX_STREAMS),
        "codec": st.sampled_from(["none", "lz4", "zstd"]),
        "populate": st.sampled_from(["all", "hot", "none"]),
        "keep_large": st.booleans(),
        "mode": st.sampled_from(["precopy", "postcopy", "hybrid"]),
    },
    messages.Welcome: {"token": st.binary(min_size=16, max_size=16)}
    | {"shares_base": st.booleans(), "base_note": st.text(max_size=messages.MAX_NOTE)},
    messages.LargePages: {"region": numbers, "units": st.binary()},
    messages.Round: {"number": st.integers(1, (1 << 31) - 1)},
    messages.RoundDone: {"number": st.integers(1, (1 << 31) - 1)},
    messages.Hot: {"region": numbers, "units": st.binary()},
    messages.Missing: {"region": numbers, "data": st.binary(), "last": st.booleans()},
    messages.State: {"data": st.binary(min_size=1)},
    messages.StateEnd: {
        "length": st.integers(0, messages.MAX_STATE),
        "digest": st.binary(min_size=32, max_size=32),
    },
    messages.Ready: {"load": seconds, "populate": seconds, "populated": populated},
    messages.Commit: {},
    messages.Running: {"resume": seconds},
    messages.Arrived: {"requests": counts, "service": seconds, "longest": seconds, "seconds": seconds}
    | {"waits": st.lists(counts, max_size=64)},
    messages.Report: dict.fromkeys(["minor_faults", "major_faults", "large_pages", "fallbacks"], counts)
    | {"populated": populated, "units": st.lists(st.binary(), max_size=64)},
    messages.Done: {},
    messages.Alive: {},
    messages.Abort: {"reason": st.text(max_size=4096)},
    messages.Recover: {"version": counts, "migration": migrations},
    messages.Outcome: {"owner": st.sampled_from(["source", "destination", "unknown"]), "complete": st.booleans()},
    messages.Serve: {"streams": st.integers(1, messages.MAX_STREAMS)},
}
"""Valid values for the fields of each message."""

everything = st.one_of(*(st.builds(kind, **fields) for kind, fields in FIELDS.items()))
timed = st.one_of(*(st.builds(kind, **fields) for kind, fields in FIELDS.items() if seconds in fields.values()))
"""Messages with at least one field in seconds."""


def body(message: Message) -> bytes:
    return messages.encode(message)[4:]


def test_every_message_is_generated() -> None:
    assert set(FIELDS) == set(KINDS)


@given(everything)
def test_message_round_trips(message: Message) -> None:
    frame = messages.encode(message)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4 <= messages.MAX_MESSAGE
    assert messages.decode(frame[4:]) == message


@given(everything, st.data())
def test_truncated_or_extended_message_is_refused(message: Message, data: st.DataObject) -> None:
    whole = body(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(msgspec.MsgspecError):
        messages.decode(whole[:cut])
    with pytest.raises(msgspec.MsgspecError):
        messages.decode(whole + b"\0")


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        message = messages.decode(data)
    except msgspec.MsgspecError:
        return
    assert type(message) in KINDS


@given(everything, st.text(min_size=1, max_size=8))
def test_unknown_field_is_refused(message: Message, name: str) -> None:
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    if name in fields:
        return
    with pytest.raises(msgspec.ValidationError):
        messages.decode(msgspec.msgpack.encode(fields | {name: 1}))


@given(everything, st.data())
def test_missing_or_mistyped_field_is_refused(message: Message, data: st.DataObject) -> None:
    fields: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,))
    name = data.draw(st.sampled_from(sorted(fields)))
    wrong_fields = [fields | {name: None}, fields | {name: [[]]}]
    if any(field.name == name and field.required for field in msgspec.structs.fields(type(message))):
        wrong_fields.append({other: value for other, value in fields.items() if other != name})
    for wrong in wrong_fields:
        with pytest.raises(msgspec.ValidationError):
            messages.decode(msgspec.msgpack.encode(wrong))


def floats(fields: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of the fields in seconds."""
    found = []
    for name, value in fields.items():
        if isinstance(value, dict):
            found += floats(value, (*path, name))
        elif isinstance(value, float):
            found.append((*path, name))
    return found


@given(
    timed,
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -1.0, -5e-324, 1e300]),
    st.data(),
)
def test_time_that_is_negative_huge_or_not_finite_is_refused(
    message: Message, time: float, data: st.DataObject
) -> None:
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    *outer, name = data.draw(st.sampled_from(floats(fields)))
    inner = fields
    for key in outer:
        inner = inner[key]
    inner[name] = time
    with pytest.raises(msgspec.ValidationError):
        messages.decode(msgspec.msgpack.encode(fields))


def lists(kind: Any) -> list[str]:
    """Return the lists, dictionaries and byte strings of a message that have no maximum length."""
    return [
        field.name
        for field in cast("msgspec.inspect.StructType", msgspec.inspect.type_info(kind)).fields
        if isinstance(field.type, msgspec.inspect.ListType | msgspec.inspect.DictType | msgspec.inspect.BytesType)
        and field.type.max_length is None
    ]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_list_and_byte_string_is_bounded(kind: type[Message]) -> None:
    assert lists(kind) == []


@pytest.mark.parametrize(
    "change",
    [
        {"migration": "0" * 31},
        {"migration": "0" * 33},
        {"migration": "0" * 32 + "\n"},
        {"migration": "A" * 32},
        {"migration": "../" * 10 + "00"},
        {"name": ""},
        {"name": "x" * 257},
        {"name": "bell\a"},
        {"regions": []},
        {"regions": [{"name": "r", "length": 0, "page_size": 4096}]},
        {"regions": [{"name": "r", "length": 4097, "page_size": 4096}]},
        {"regions": [{"name": "r", "length": -4096, "page_size": 4096}]},
        {"regions": [{"name": "r", "length": (1 << 48) + 4096, "page_size": 4096}]},
        {"regions": [{"name": "r", "length": 4096, "page_size": 1}]},
        {"regions": [{"name": "r", "length": 4096, "page_size": 4096}] * 65},
        {"streams": 0},
        {"streams": 17},
        {"codec": "gzip"},
        {"version": -1},
        {"details": {"key": [1]}},
        {"details": {"key": "x" * (1 << 16)}},
        {"details": {str(number): 1 for number in range(257)}},
        {"regions": [{"name": "r", "length": 4096, "page_size": 4097}]},
    ],
    ids=lambda change: str(change)[:50],
)
def test_values_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    good = {
        "type": "Hello",
        "version": 1,
        "migration": "0" * 32,
        "kind": "arena",
        "name": "a",
        "details": {},
        "regions": [{"name": "r", "length": 4096, "page_size": 4096}],
        "streams": 1,
        "codec": "none",
        "populate": "all",
        "keep_large": True,
        "mode": "precopy",
    }
    messages.decode(msgspec.msgpack.encode(good))
    with pytest.raises(msgspec.ValidationError):
        messages.decode(msgspec.msgpack.encode(good | change))


def test_oversized_message_is_not_sent() -> None:
    with pytest.raises(ValueError, match="limit"):
        messages.encode(messages.LargePages(region=0, units=bytes(messages.MAX_MESSAGE)))


@given(st.integers(0, 1 << 62))
def test_version_is_read_from_messages_of_any_release(version: int) -> None:
    future = msgspec.msgpack.encode({"type": "Hello", "version": version, "something": ["new"]})
    assert messages.version_of(future) == version
    assert messages.version_of(b"\xc1") == messages.VERSION
    if version != messages.VERSION:
        with pytest.raises(ProtocolError, match=f"version {version} "):
            messages.check_version(version)


@given(st.lists(st.booleans(), max_size=200))
def test_unit_maps_round_trip(units: list[bool]) -> None:
    packed = messages.pack_units(units)
    assert messages.unpack_units(packed, len(units)) == units
    assert len(packed) == -(-len(units) // 8)


@given(st.binary(max_size=64), st.integers(0, 512))
def test_unit_map_of_another_length_is_refused(packed: bytes, count: int) -> None:
    if len(packed) == -(-count // 8):
        units = messages.unpack_units(packed, count)
        assert len(units) == count
        # Bits beyond the last unit are ignored.
        assert messages.pack_units(units)[: count // 8] == packed[: count // 8]
    else:
        with pytest.raises(ValueError, match="units"):
            messages.unpack_units(packed, count)
