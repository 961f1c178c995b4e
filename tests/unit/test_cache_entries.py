"""Entries of the cache of images: which file belongs to which entry, and when an entry is complete."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from pageferry.images.metadata import ImageIdentity
from pageferry.stores import entry
from pageferry.stores.entry import CachedFile, Entry

DIGEST = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the directory of an entry with the files `image` and `base`."""
    folder = tmp_path / DIGEST
    (folder / "files").mkdir(parents=True)
    for part in (folder, folder / "files"):
        part.chmod(0o700)
    found = []
    for name in ("image", "base"):
        (folder / "files" / name).write_bytes(b"contents")
        identity = ImageIdentity(id="0" * 32, digest="0" * 16)
        found.append(CachedFile(name=name, identity=identity, manifest=DIGEST, contents=8))
    (folder / "entry.json").write_bytes(msgspec.json.encode(Entry(url="s3://bucket/image", files=found)))
    return folder


@pytest.mark.parametrize(("name", "number"), [("image", 0), ("base", 1)])
def test_file_of_an_entry_is_found(folder: Path, name: str, number: int) -> None:
    found = entry.entry_of(folder / "files" / name)
    assert found is not None
    assert (found[0], found[1].url, found[2]) == (folder, "s3://bucket/image", number)


@pytest.mark.parametrize("part", [".", "files"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_entry_that_other_users_can_write_is_ignored(folder: Path, part: str, mode: int) -> None:
    (folder / part).chmod(mode)
    assert entry.entry_of(folder / "files" / "image") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of a directory")
def test_entry_of_another_user_is_ignored(folder: Path) -> None:
    os.chown(folder, 65534, 65534)
    assert entry.entry_of(folder / "files" / "image") is None


def test_file_outside_of_an_entry_is_not_found(folder: Path, tmp_path: Path) -> None:
    assert entry.entry_of(tmp_path / "image") is None
    assert entry.entry_of(folder / "files" / "other") is None
    (folder / "entry.json").write_bytes(b"{}")
    assert entry.entry_of(folder / "files" / "image") is None


def test_complete_entry_is_incomplete_after_a_file_is_replaced(folder: Path) -> None:
    found = entry.load(folder)
    assert found is not None
    assert not entry.is_complete(folder, found)
    descriptors = [os.open(folder / "files" / name, os.O_RDONLY) for name in ("image", "base")]
    try:
        entry.mark_complete(folder, descriptors)
        assert entry.is_complete(folder, found)
        (folder / "new").write_bytes(b"contents")
        (folder / "new").rename(folder / "files" / "base")
        assert not entry.is_complete(folder, found)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_version_of_a_cached_file_does_not_change_with_its_contents(folder: Path, tmp_path: Path) -> None:
    before = entry.version_of(folder / "files" / "image")
    (folder / "files" / "image").write_bytes(b"blocks")
    assert before is not None
    assert entry.version_of(folder / "files" / "image") == before
    assert entry.version_of(tmp_path / "image") is None
