"""Encrypted uploads of all kinds: checkpoints, dumps, flattened images and copies, and their journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.errors import ImageError, UsageError, WrongKey
from pageferry.images.image import ImageFile
from pageferry.stores import blocks, layout, manifests, push, sealing
from pageferry.stores.address import image_url
from pageferry.stores.keys import Access, parse
from pageferry.stores.library import digest
from pageferry.stores.references import open_image, seal_reference
from pageferry.stores.store import Store

pyrage = pytest.importorskip("pyrage", reason="the extra `stores` is not installed")

MIB = 1 << 20
SIZE = 8 * MIB
MARK = b"the contents of this workload are secret"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of the cache. Packs have 1 MiB."""
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(layout, "PACK_LENGTH", MIB)
    return tmp_path / "cache"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a store in a directory."""
    return f"file://{tmp_path}/store"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Return the file with a raw key."""
    return write_key(tmp_path / "raw.key", bytes(range(32)))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Return the file with another key, an identity of age."""
    return write_key(tmp_path / "age.key", str(pyrage.x25519.Identity.generate()).encode())


@pytest.fixture
def arena() -> pageferry.Arena:
    """Return an arena of random words, with a page of text."""
    arena = pageferry.Arena(SIZE)
    words(arena)[:] = np.random.default_rng(1).integers(0, 1 << 63, SIZE // 8, dtype="u8")
    memoryview(arena)[: len(MARK)] = MARK
    return arena


def write_key(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    path.chmod(0o600)
    return path


def words(arena: Any) -> Any:
    return np.frombuffer(memoryview(arena), "u8")


def stored(url: str) -> list[bytes]:
    """Return the contents of all objects of a store in a directory."""
    return [path.read_bytes() for path in Path(url.removeprefix("file://")).rglob("*") if path.is_file()]


def test_encrypted_checkpoints_are_restored_with_the_key_only(
    arena: pageferry.Arena, url: str, key: Path, other: Path
) -> None:
    first = pageferry.checkpoint(arena, f"{url}/first", track=True, codec="none", key=key).upload
    words(arena)[1000] = 7
    options: dict[str, Any] = {"parent": f"{url}/first", "codec": "none"}
    second = pageferry.checkpoint(arena, f"{url}/second", key=key, **options)
    assert first is not None
    assert second.upload is not None
    assert (first.encrypted, second.upload.encrypted) == (True, True)
    assert second.pages.in_parent > 0
    assert (second.upload.blocks, first.blocks) == (1, SIZE // MIB)
    assert not any(MARK in contents for contents in stored(url))
    restored = pageferry.restore(f"{url}/second", key=key)
    assert (words(restored) == words(arena)).all()
    wrongs: list[dict[str, Any]] = [{}, {"key": other}]
    for wrong in wrongs:
        with pytest.raises(WrongKey):
            pageferry.restore(f"{url}/second", **wrong)
        with pytest.raises(WrongKey):
            pageferry.checkpoint(arena, f"{url}/third", **options, **wrong)
    assert [image.name for image in pageferry.list_images(url).images] == ["first", "second"]


def test_key_encrypts_the_parents_of_a_checkpoint(arena: pageferry.Arena, url: str, key: Path, tmp_path: Path) -> None:
    pageferry.checkpoint(arena, tmp_path / "base", codec="none", track=True)
    words(arena)[1000] = 7
    pageferry.checkpoint(arena, f"{url}/child", parent=tmp_path / "base", codec="none", key=key)
    assert not any(MARK in contents for contents in stored(url))
    assert (words(pageferry.restore(f"{url}/child", key=key)) == words(arena)).all()
    pageferry.checkpoint(arena, f"{url}/plain", codec="none")
    with pytest.raises(WrongKey, match="it is not encrypted"):
        pageferry.checkpoint(arena, f"{url}/next", parent=f"{url}/plain", codec="none", key=key)
    pageferry.checkpoint(arena, f"{url}/next", parent=f"{url}/plain", codec="none", key=key, allow_plain=True)
    assert (words(pageferry.restore(f"{url}/next", key=key)) == words(arena)).all()


def test_keys_without_effect_are_refused(arena: pageferry.Arena, url: str, key: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    pageferry.checkpoint(arena, file)
    calls: list[Callable[[], object]] = [
        lambda: pageferry.checkpoint(arena, tmp_path / "other", key=key),
        lambda: pageferry.checkpoint(arena, f"{url}/a", parent=file, key=key, allow_plain=True),
        lambda: pageferry.dump({}, tmp_path / "other", key=key),
        lambda: pageferry.image_info(file, key=key),
        lambda: pageferry.verify_image(file, key=key),
        lambda: pageferry.compare_images(file, file, key=key),
        lambda: pageferry.flatten_image(file, tmp_path / "other", key=key),
        lambda: pageferry.flatten_image(file, f"{url}/a", key=key, allow_plain=True),
        lambda: pageferry.export_image(file, firecracker=tmp_path / "m", vmstate=tmp_path / "v", key=key),
        lambda: pageferry.serve(file, firecracker=tmp_path / "socket", key=key),
        lambda: pageferry.copy_image(file, f"{url}/a", key=key, allow_plain=True),
        lambda: pageferry.checkpoint(arena, f"{url}/a", key=key, key_command="cat key"),
        lambda: pageferry.checkpoint(arena, f"{url}/a@{'0' * 64}", key=key),
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "store").exists()
    assert main(["checkpoint", "none", str(tmp_path / "other"), "--key", str(key)]) == UsageError.exit_code


def test_operations_on_urls_take_the_key(
    arena: pageferry.Arena, url: str, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pageferry.checkpoint(arena, f"{url}/base", track=True, key=key)
    words(arena)[1000] = 7
    pageferry.checkpoint(arena, f"{url}/child", parent=f"{url}/base", key=key)
    child = f"{url}/child"
    pageferry.flatten_image(child, tmp_path / "flat", key=key)
    pageferry.flatten_image(child, f"{url}/flat", key=key)
    pageferry.dump({"x": np.arange(1 << 18)}, f"{url}/object", key=key)
    assert (pageferry.load(f"{url}/object", key=key)["x"] == np.arange(1 << 18)).all()
    assert [image.encrypted for image in pageferry.list_images(url).images] == [True] * 4
    assert pageferry.verify_image(child, key=key).intact
    assert pageferry.compare_images(child, tmp_path / "flat", key=key).same
    assert pageferry.compare_images(f"{url}/flat", child, key=key).same
    for arguments in (["info", child], ["verify", child], ["diff", child, f"{url}/flat"]):
        assert main(["image", *arguments, "--key", str(key)]) == 0
        assert main(["image", *arguments]) == WrongKey.exit_code
    for call in (pageferry.image_info, pageferry.verify_image):
        with pytest.raises(WrongKey):
            call(child)
    with pytest.raises(WrongKey):
        pageferry.flatten_image(child, f"{url}/flat2")
    assert "encrypted" in capsys.readouterr().err


def test_copies_are_encrypted_and_share_the_key_domain(
    arena: pageferry.Arena, url: str, key: Path, other: Path, tmp_path: Path
) -> None:
    back = f"file://{tmp_path}/back"
    pageferry.checkpoint(arena, f"{url}/base", track=True, codec="none", key=key)
    words(arena)[1000] = 7
    pageferry.checkpoint(arena, f"{url}/child", parent=f"{url}/base", codec="none", key=key)
    wrongs: list[dict[str, Any]] = [{}, {"key": other}]
    for wrong in wrongs:
        with pytest.raises(WrongKey):
            pageferry.copy_image(f"{url}/child", f"{back}/", **wrong)
    first = pageferry.copy_image(f"{url}/base", f"{back}/", key=key)
    second = pageferry.copy_image(f"{url}/child", f"{back}/", key=key)
    assert isinstance(first, pageferry.ImagePushed)
    assert isinstance(second, pageferry.ImagePushed)
    assert (first.encrypted, first.uploaded_blocks) == (True, SIZE // MIB)
    assert (second.parents, second.uploaded_blocks) == (0, 1)
    assert not any(MARK in contents for contents in stored(back))
    assert (words(pageferry.restore(f"{back}/child", key=key)) == words(arena)).all()


def test_copies_to_another_key_domain_are_encrypted_again(
    arena: pageferry.Arena, url: str, key: Path, tmp_path: Path
) -> None:
    back = f"file://{tmp_path}/back"
    pageferry.checkpoint(arena, f"{url}/image", codec="none", key=key)
    pageferry.dump({"x": np.arange(1 << 18)}, f"{back}/object", key=key)  # begins another domain
    copied = pageferry.copy_image(f"{url}/image", f"{back}/", key=key)
    assert isinstance(copied, pageferry.ImagePushed)
    assert copied.uploaded_blocks == SIZE // MIB
    assert (words(pageferry.restore(f"{back}/image", key=key)) == words(arena)).all()
    pageferry.checkpoint(arena, f"{url}/plain", codec="none")
    with pytest.raises(WrongKey, match="it is not encrypted"):
        pageferry.copy_image(f"{url}/plain", f"{back}/", key=key)
    pageferry.copy_image(f"{url}/plain", f"{back}/", key=key, allow_plain=True)
    assert [image.encrypted for image in pageferry.list_images(back).images] == [True] * 3
    assert not any(MARK in contents for contents in stored(back))


def test_cached_contents_of_an_encrypted_image_are_not_uploaded_in_plain(
    arena: pageferry.Arena, url: str, key: Path
) -> None:
    pageferry.checkpoint(arena, f"{url}/image", key=key)
    pageferry.restore(f"{url}/image", key=key).load()
    [cached] = pageferry.list_cache().images
    with pytest.raises(WrongKey, match="the upload would not be encrypted"):
        pageferry.push_image(cached.path, f"{url}/plain")
    with pytest.raises(WrongKey, match="the upload would not be encrypted"):
        pageferry.checkpoint(arena, f"{url}/plain", parent=cached.path)
    assert pageferry.push_image(cached.path, f"{url}/again", key=key).uploaded_blocks == 0


def test_journal_of_an_encrypted_upload_is_continued_in_its_key_domain_only(
    arena: pageferry.Arena,
    url: str,
    key: Path,
    other: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = tmp_path / "image"
    pageferry.checkpoint(arena, image, codec="none")

    def interrupted(**options: Any) -> None:
        def fail(point: str) -> None:
            if point == "store.uploaded":
                raise OSError("as if the process were killed")

        with monkeypatch.context() as patch:
            patch.setattr(push, "fault_point", fail)
            with pytest.raises(OSError, match="killed"):
                pageferry.push_image(image, f"{url}/image", **options)

    interrupted(key=key)
    journal = b"".join(path.read_bytes() for path in (cache / "uploads").rglob("*") if path.is_file())
    assert journal
    for contents in contents_of_blocks(image):
        assert digest(contents) not in journal
    total = pageferry.push_image(image, f"{url}/plain").uploaded_blocks
    assert total == pageferry.push_image(image, f"{url}/other", key=other).uploaded_blocks > 1
    again = pageferry.push_image(image, f"{url}/image", key=key)
    assert (again.uploaded_blocks, again.encrypted) == (0, True)
    pageferry.pull_image(f"{url}/image", tmp_path / "copy", key=key)
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()
    assert [path for path in (cache / "uploads").rglob("*") if path.is_file()] == []


def contents_of_blocks(path: Path) -> list[bytes]:
    """Return the storage blocks of an image file in their normal form."""
    found = []
    for number, (offset, length) in enumerate(ImageFile(path).image.blocks):
        block = bytearray(path.read_bytes()[offset : offset + length])
        blocks.normalize(block, number)
        found.append(bytes(block))
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 1 << 32}, "storage blocks, expected at most"),
        ({"count": blocks.MAX_BLOCKS}, "the table of .* has only"),
        (
            {"packs": [layout.PackEntry(bytes(32), 100)] * (layout.MAX_ENTRIES + 1)},
            "its directory is (truncated|invalid)",
        ),
    ],
)
def test_hostile_encrypted_manifest_is_refused_before_memory_is_allocated(
    arena: pageferry.Arena, url: str, key: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pageferry.checkpoint(arena, f"{url}/a", key=key)
    keys, address = parse(key.read_bytes(), "key"), image_url("url", f"{url}/a")
    reference, [manifest] = asyncio.run(open_image(Store(address.store), address, Access(keys)))
    domain = manifest.sealing
    directory = msgspec.structs.replace(manifest.directory, **changes)
    parts = manifest.contents[: directory.blocks.offset + directory.blocks.length]
    data, found = layout.encode_manifest(parts, manifests.sealed(directory, manifest.salt, domain, keys))
    store = tmp_path / "store"
    (store / layout.manifest_key(directory.id, found)).write_bytes(data)
    visible = msgspec.structs.replace(
        reference, manifest=found, manifest_length=len(data), digest=directory.digest, kind="arena", sealed=b""
    )
    (store / "images" / "a").write_bytes(msgspec.json.encode(seal_reference(visible, "a", domain)))
    assert isinstance(domain, sealing.Domain)
    with pytest.raises(ImageError, match=message):
        pageferry.pull_image(f"{url}/a", tmp_path / "copy", key=key)
    with pytest.raises(ImageError, match=message):
        pageferry.restore(f"{url}/a", key=key)
    pageferry.checkpoint(arena, f"{url}/b", key=key)  # uploads ignore it
