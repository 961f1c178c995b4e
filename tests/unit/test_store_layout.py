"""Encoding of manifests, references, block tables and frames, and refusal of damaged ones."""

from __future__ import annotations

import asyncio
import os
import random
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.errors import ImageError
from pageferry.stores import blocks, frame, layout, library
from pageferry.stores.address import store_url
from pageferry.stores.blocks import BlockRecord
from pageferry.stores.layout import Ancestor, Chunk, Directory, PackEntry, Part
from pageferry.stores.manifests import read_tail
from pageferry.stores.store import Store

pytest.importorskip("blake3", reason="the extra `stores` is not installed")

ID, HEX, DIGEST = "0" * 32, "1" * 64, "2" * 16


def directory(**changes: object) -> Directory:
    empty = Part(0, 0, bytes(32))
    plain = Directory(
        random=bytes(16),
        id=ID,
        digest=DIGEST,
        length=1 << 20,
        packs=[PackEntry(bytes(32), 100)],
        blocks=empty,
        count=0,
        frame=empty,
        chunks=[],
        ancestors=[Ancestor(id=ID, digest=DIGEST, manifest=HEX, name="base")],
    )
    return msgspec.structs.replace(plain, **changes)


def test_manifest_is_read_as_it_was_written() -> None:
    encoded, digest = layout.encode_manifest(b"parts", directory())
    assert layout.decode_manifest(encoded, digest, "here") == directory()
    assert encoded.startswith(b"parts")
    assert layout.tail_length(encoded[-100:], len(encoded)) == len(encoded) - 5


@given(st.data())
def test_changed_manifest_is_refused(data: st.DataObject) -> None:
    encoded, digest = layout.encode_manifest(b"", directory())
    at = data.draw(st.integers(0, len(encoded) - 1))
    changed = bytearray(encoded)
    changed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ImageError, match="cannot read here"):
        layout.decode_manifest(bytes(changed), digest, "here")
    with pytest.raises(ImageError, match="cannot read here"):
        layout.decode_manifest(encoded[: at + 0], digest, "here")


@pytest.mark.parametrize(
    ("version", "features", "cause"), [(2, 0, "unsupported version 2"), (1, 4, "unsupported features 0x4")]
)
def test_unknown_versions_and_features_are_refused(version: int, features: int, cause: str) -> None:
    body = msgspec.msgpack.encode(directory())
    head = layout.TRAILER_HEAD.pack(layout.MANIFEST_MAGIC, version, 0, features, len(body))
    digest = library.digest(body + head)
    with pytest.raises(ImageError, match=cause):
        layout.decode_manifest(body + head + digest, digest.hex(), "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../x"},
        {"digest": "x"},
        {"packs": [PackEntry(bytes(31), 100)]},
        {"packs": [PackEntry(bytes(32), layout.MAX_PACK + 1)]},
        {"chunks": [Chunk(0, (1 << 20) + 1, 1, 0)]},
        {"ancestors": [Ancestor(id=ID, digest=DIGEST, manifest=HEX, name="../base")]},
        {"ancestors": [Ancestor(id=ID, digest=DIGEST, manifest=HEX, name="base")] * 256},
        {"length": -1},
    ],
)
def test_invalid_directories_are_refused(changes: dict[str, object]) -> None:
    encoded, digest = layout.encode_manifest(b"", directory(**changes))
    with pytest.raises(ImageError, match="its directory is invalid"):
        layout.decode_manifest(encoded, digest, "here")


@pytest.mark.parametrize("contents", [b"", b"{}", b"\xff", b"[1]", b'{"format":"other"}'])
def test_invalid_references_are_refused(contents: bytes) -> None:
    with pytest.raises(ImageError, match="not a reference"):
        layout.decode_reference(contents, "here")


# -- storage blocks


def records(lengths: list[int]) -> list[BlockRecord]:
    found, offset = [], 4096
    for length in lengths:
        found.append(BlockRecord(os.urandom(32), os.urandom(8), offset, length, 0, 64, blocks.NORMAL))
        offset += length
    return found


@given(st.lists(st.integers(blocks.HEADER, 1 << 16), max_size=50))
def test_block_table_is_read_as_it_was_written(lengths: list[int]) -> None:
    table = records(lengths)
    stored = memoryview(blocks.encode_table(table))
    assert blocks.decode_table(stored, len(table), [1 << 20], 1 << 30) == table


@pytest.mark.parametrize(
    "change",
    [
        {"pack": 1},
        {"start": 1 << 20},
        {"length": 10},
        {"length": blocks.MAX_BLOCK + 1},
        {"offset": 0},
        {"offset": 1 << 30},
        {"flags": 2},
    ],
)
def test_invalid_block_tables_are_refused(change: Any) -> None:
    table = records([1000, 1000])
    table[1] = table[1]._replace(**change)
    with pytest.raises(ImageError):
        blocks.decode_table(memoryview(blocks.encode_table(table)), 2, [1 << 20], 1 << 30)


def test_truncated_and_expanding_block_tables_are_refused() -> None:
    stored = memoryview(blocks.encode_table(records([1000] * 10)))
    for damaged, count in ((stored[:-20], 10), (stored, 11), (memoryview(b"no zlib"), 1)):
        with pytest.raises(ImageError, match="table of storage blocks"):
            blocks.decode_table(damaged, count, [1 << 20], 1 << 30)
    bomb = memoryview(zlib.compress(bytes(1 << 28)))
    with pytest.raises(ImageError):
        blocks.decode_table(bomb, 1 << 22, [1 << 20], 1 << 30)


def test_normal_form_hides_the_position_and_is_reversible() -> None:
    head, rest = random.Random(1).randbytes(32), random.Random(2).randbytes(1000)
    checksum = (b"checksum", b"another ")
    made = [bytearray(head + number.to_bytes(8, "little") + bytes(16) + checksum[number] + rest) for number in (0, 1)]
    originals = [bytes(block) for block in made]
    found = [blocks.normalize(block, number) for number, block in enumerate(made)]
    assert made[0] == made[1]
    for number, (kept, flags) in enumerate(found):
        digest = library.digest(bytes(made[number]))
        record = BlockRecord(digest, kept, 0, len(made[number]), 0, 0, flags)
        assert blocks.restore(memoryview(made[number]), record, number) == originals[number]
        with pytest.raises(ImageError, match="does not match its digest"):
            blocks.restore(memoryview(originals[number]), record, number)
    misnumbered = bytearray(originals[1])
    assert blocks.normalize(misnumbered, 5) == (b"another ", 0)
    assert misnumbered == originals[1]


# -- frame


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """Contents of a file with zeros, entries of a page map and random bytes, and the blocks in it."""
    parts = draw(st.lists(st.tuples(st.sampled_from("zre"), st.integers(1, 300_000)), max_size=6))
    made: dict[str, Any] = {
        "z": lambda size: bytes(size),
        "r": lambda size: random.Random(size).randbytes(size),
        "e": lambda size: (random.Random(size).randbytes(8) + b"\1\0\0\0\2\0\4\0") * (size // 16),
    }
    contents = b"".join(made[kind](size) for kind, size in parts)
    cuts = sorted(draw(st.lists(st.integers(0, len(contents)), max_size=6)))
    return contents, [(first, end - first) for first, end in zip(cuts[::2], cuts[1::2], strict=False) if end > first]


@given(files())
def test_frame_restores_all_bytes_outside_of_blocks(file: tuple[bytes, list[tuple[int, int]]]) -> None:
    contents, extents = file
    source, target = os.memfd_create("source"), os.memfd_create("target")
    try:
        os.write(source, contents)
        stored, chunks = frame.encode(source, extents, len(contents))
        frame.write(target, memoryview(stored), chunks, len(contents))
        for offset, length in extents:
            os.pwrite(target, contents[offset : offset + length], offset)
        assert os.pread(target, len(contents) + 1, 0) == contents
    finally:
        os.close(source)
        os.close(target)


@pytest.mark.parametrize(
    ("chunks", "stored"),
    [
        ([Chunk(0, 10, 10, 0), Chunk(5, 10, 10, 0)], bytes(20)),
        ([Chunk(95, 10, 10, 0)], bytes(10)),
        ([Chunk(0, 10, 10, 0)], bytes(5)),
        ([Chunk(0, 10, 9, 1)], b"no zlib.."),
        ([Chunk(0, 10, 100, 1)], zlib.compress(bytes(1 << 20))),
        ([Chunk(0, 10, 100, 1)], zlib.compress(bytes(9))),
        ([Chunk(0, 10, 100, 2)], zlib.compress(bytes(10))),
    ],
)
def test_invalid_frames_are_refused(tmp_path: Path, chunks: list[Chunk], stored: bytes) -> None:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(ImageError, match="chunk"):
            frame.write(descriptor, memoryview(stored), chunks, 100)
    finally:
        os.close(descriptor)


def test_length_of_an_object_does_not_determine_how_much_memory_is_read(tmp_path: Path) -> None:
    tail = layout.TRAILER_HEAD.pack(layout.MANIFEST_MAGIC, layout.VERSION, 0, 0, (1 << 32) - 1) + bytes(32)
    assert layout.tail_length(tail, 1 << 40) == layout.MAX_DIRECTORY + layout.TRAILER
    opened = Store(store_url("url", f"file://{tmp_path}"))
    for length in (layout.TRAILER - 1, layout.MAX_MANIFEST + 1):
        with pytest.raises(ImageError, match=f"it has {length} bytes"):
            asyncio.run(read_tail(opened, "manifests/x", "0" * 64, length))
