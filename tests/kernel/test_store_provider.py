"""Providers of storage blocks: when they mark an entry of the cache as complete. The tests act as the engine."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.images.image import ImageFile
from pageferry.stores import entry
from pageferry.stores.address import ImageUrl, StoreUrl, image_url
from pageferry.stores.provider import Provider, SuppliedFile

SIZE = 4 << 20
DEMAND, PREFETCH, END_OF_ORDER = 1, 3, 4
FAILED = 2


def words(arena: Any) -> Any:
    """Return the memory of an arena as an array."""
    return np.frombuffer(memoryview(arena), "u8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name an empty cache in the environment."""
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def arena(tmp_path: Path) -> Any:
    """Return an arena, whose image is the file `base`."""
    arena = pageferry.Arena(SIZE)
    words(arena)[:] = np.random.default_rng(1).integers(0, 1 << 63, SIZE // 8, dtype="u8")
    pageferry.checkpoint(arena, tmp_path / "base", track=True)
    return arena


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def key(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the option with the key of the images."""
    if not request.param:
        return {}
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(os.urandom(32).hex())
    return {"key": path}


def entry_of(image: str | Path) -> tuple[Path, entry.Entry]:
    """Return the directory and the record of an entry of the cache."""
    found = entry.entry_of(Path(image))
    assert found is not None
    return found[:2]


def is_complete(image: str | Path) -> bool:
    """Return whether an entry is marked as complete."""
    return entry.is_complete(*entry_of(image))


async def prefetch_all(image: Path) -> None:
    """Fetch all blocks of an image with one file, and wait until its entry is complete."""
    folder, record = entry_of(image)
    table = folder / "tables" / record.files[0].manifest
    file = SuppliedFile(os.open(image, os.O_RDWR), os.open(table, os.O_RDONLY))
    provider = Provider(image_url("url", record.url), [file], 0, folder)
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(provider.run(theirs))
    try:
        for number in range(len(ImageFile(image).image.blocks)):
            ours.sendall(struct.pack("<III", PREFETCH, 0, number))
        ours.sendall(struct.pack("<III", END_OF_ORDER, 0, 0))
        async with asyncio.timeout(30):
            while not is_complete(image):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        ours.close()
        await serving


def test_blocks_of_earlier_restores_are_verified(arena: Any, key: dict[str, Any], tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/base"
    pageferry.push_image(tmp_path / "base", url, **key)
    pageferry.restore(url, prefetch=False, **key)
    (cached,) = pageferry.list_cache().images
    image = Path(cached.path)
    asyncio.run(prefetch_all(image))
    assert pageferry.verify_image(image).findings == []
    (image.parent.parent / "complete.json").unlink()
    offset, length = ImageFile(image).image.blocks[0]
    with image.open(
        "r+b"
    ) as file:  # the header of the block was written before a crash of the host, its pages were not
        file.seek(offset + length // 2)
        file.write(bytes(4096))
    asyncio.run(prefetch_all(image))
    assert ImageFile(image).verify() == []


def test_entry_is_not_marked_by_a_child_outside_of_it(arena: Any, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/base"
    pageferry.push_image(tmp_path / "base", url)
    words(arena)[: SIZE // 16] = 1
    pageferry.checkpoint(arena, tmp_path / "child", parent=tmp_path / "base")
    pageferry.restore(url, prefetch=False)
    (cached,) = pageferry.list_cache().images
    (tmp_path / "base").unlink()
    (tmp_path / "base").symlink_to(cached.path)
    restored = pageferry.restore(tmp_path / "child")
    restored.load()
    assert (words(restored) == words(arena)).all()
    time.sleep(1)  # an entry is marked soon after its blocks are fetched
    assert not is_complete(cached.path)
    (image,) = pageferry.list_cache().images
    assert image.length < image.contents


def test_failure_with_any_text_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logging.getLogger("pageferry.stores"), "disabled", True
    )  # a test report cannot contain the text
    ours, theirs = socket.socketpair()
    url = ImageUrl(StoreUrl("file:///table-\udcff", "file"), "base")  # as in an error that names an invalid path
    table = tmp_path / "table"
    table.write_bytes(b"")
    file = SuppliedFile(os.open(table, os.O_RDWR), os.open(table, os.O_RDONLY))
    provider = Provider(url, [file], 0, None)

    async def run() -> bytes:
        serving = asyncio.create_task(provider.run(theirs))
        ours.sendall(struct.pack("<III", DEMAND, 0, 0))
        ours.setblocking(False)
        async with asyncio.timeout(30):
            reply = await asyncio.get_running_loop().sock_recv(ours, 1 << 16)
        ours.close()
        await serving
        return reply

    reply = asyncio.run(run())
    kind, image, block, length = struct.unpack("<IIII", reply[:16])
    assert (kind, image, block, length) == (FAILED, 0, 0, len(reply) - 16)
    assert b"table-" in reply
