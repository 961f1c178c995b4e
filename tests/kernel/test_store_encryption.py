"""Encrypted images in stores: round trips, reuse, changes by users with write access to the store, and refusals."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.errors import ImageError, PageferryError, UsageError, WrongKey
from pageferry.images.image import ImageFile
from pageferry.stores import layout, library
from pageferry.stores.address import image_url
from pageferry.stores.keys import Access, parse
from pageferry.stores.manifests import Manifest, read_manifest
from pageferry.stores.references import open_image
from pageferry.stores.sealing import Domain
from pageferry.stores.store import Store

pyrage = pytest.importorskip("pyrage", reason="the extra `stores` is not installed")

SIZE = 3 << 20


class World:
    """Images, a store and key files in a directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder}/store"
        self.base, self.child = folder / "images" / "base", folder / "images" / "child"
        self.arena = pageferry.Arena(SIZE)
        self.words = np.frombuffer(memoryview(self.arena), "u8")
        self.words[:] = np.random.default_rng(1).integers(0, 1 << 63, SIZE // 8, dtype="u8")
        self.base.parent.mkdir()
        pageferry.checkpoint(self.arena, self.base, track=True)
        self.words[: 1 << 12] = 7
        pageferry.checkpoint(self.arena, self.child, parent=self.base)
        self.identity = pyrage.x25519.Identity.generate()
        self.raw = self.key("raw", bytes(range(32)))
        self.age = self.key("age", f"{self.identity}\n".encode())
        self.recipient = self.key("recipient", f"{self.identity.to_public()}\n".encode())

    def key(self, name: str, contents: bytes) -> Path:
        """Write a key file, and return its path."""
        path = self.folder / name
        path.write_bytes(contents)
        path.chmod(0o600)
        return path

    def objects(self, kind: str = "") -> list[Path]:
        return sorted(path for path in (self.folder / "store" / kind).rglob("*") if path.is_file())

    def pull(self, name: str, **options: Any) -> bytes:
        """Download an image to a new directory, and return its contents."""
        folder = self.folder / f"pull-{os.urandom(4).hex()}"
        folder.mkdir()
        try:
            pageferry.pull_image(f"{self.url}/{name}", folder / "image", **options)
            return (folder / "image").read_bytes()
        finally:
            if not (folder / "image").exists():
                assert list(folder.iterdir()) == [] or name.startswith("child")
            shutil.rmtree(folder)

    def manifest(self, name: str, key: Path) -> Manifest:
        """Open the manifest of an image."""
        url = image_url("url", f"{self.url}/{name}")
        access = Access(parse(key.read_bytes(), str(key)))
        return asyncio.run(open_image(Store(url.store), url, access))[1][0]

    def age_objects(self) -> None:
        """Set the modification times of all objects to an earlier time."""
        then = time.time() - 7200
        for path in (self.folder / "store").rglob("*"):
            os.utime(path, (then, then))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return images, an empty store and key files."""
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
    return World(tmp_path)


@pytest.mark.parametrize("kind", ["raw", "age"])
def test_pulled_images_equal_the_pushed_ones(world: World, kind: str) -> None:
    key = world.folder / kind
    pushed = pageferry.push_image(world.child, f"{world.url}/day", key=key)
    assert (pushed.parents, pushed.encrypted) == (1, True)
    target = world.folder / "pulled" / "today"
    target.parent.mkdir()
    pulled = pageferry.pull_image(f"{world.url}/day", target, key=key)
    assert pulled.encrypted
    assert target.read_bytes() == world.child.read_bytes()
    assert (target.parent / "base").read_bytes() == world.base.read_bytes()
    assert pageferry.push_image(world.child, f"{world.url}/day", key=key).existed
    for path in world.objects("packs"):
        assert int.from_bytes(path.read_bytes()[12:16], "little") == layout.ENCRYPTED


def test_store_contains_no_contents_names_or_digests_of_contents(world: World) -> None:
    text = b"a secret that must not be readable in the store"
    memoryview(world.arena)[1 << 20 : (1 << 20) + len(text)] = text
    image = world.folder / "image"
    pageferry.checkpoint(world.arena, image, codec="none")
    assert text in image.read_bytes()
    pageferry.push_image(image, f"{world.url}/plain")
    plain = [path.read_bytes() for path in world.objects()]
    assert any(text in one for one in plain)
    url = image_url("url", f"{world.url}/plain")
    (manifest,) = asyncio.run(open_image(Store(url.store), url, Access()))[1]
    shutil.rmtree(world.folder / "store")
    pageferry.push_image(image, f"{world.url}/encrypted", key=world.raw)
    stored = [path.read_bytes() for path in world.objects()]
    about = ImageFile(image)
    hidden = [text, about.identity.digest.encode(), b"arena", *(one.digest for one in manifest.records())]
    hidden += [one.checksum for one in manifest.records()]
    for secret in hidden:
        assert not any(secret in one or secret.hex().encode() in one for one in stored)


def test_contents_are_shared_in_a_key_domain_only(world: World) -> None:
    one, other = world.folder / "one", world.folder / "other"
    pageferry.checkpoint(world.arena, one, mode="stop")
    first = pageferry.push_image(one, f"{world.url}/a", key=world.raw)
    assert first.uploaded_blocks == first.blocks > 2
    world.words[-1] += 1
    pageferry.checkpoint(world.arena, other, mode="stop")
    second = pageferry.push_image(other, f"{world.url}/b", key=world.raw)
    assert 0 < second.uploaded_blocks < second.blocks
    others: dict[str, Any] = {"c": {}, "d": {"key": world.age}, "e": {"key": world.key("k", bytes(32))}}
    for name, options in others.items():
        third = pageferry.push_image(other, f"{world.url}/{name}", **options)
        assert third.uploaded_blocks == third.blocks
    assert world.pull("b", key=world.raw) == world.pull("c") == world.pull("d", key=world.age) == other.read_bytes()


def test_parents_are_uploaded_again_in_the_domain_of_their_children(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/plain")
    pageferry.push_image(world.base, f"{world.url}/raw", key=world.raw)
    first = pageferry.push_image(world.child, f"{world.url}/child-1", key=world.age)
    second = pageferry.push_image(world.child, f"{world.url}/child-2", key=world.age)
    plain = pageferry.push_image(world.child, f"{world.url}/child-3")
    assert (first.parents, second.parents, plain.parents) == (1, 0, 0)
    for name, options in (("child-1", {"key": world.age}), ("child-2", {"key": world.age}), ("child-3", {})):
        assert world.pull(name, **options) == world.child.read_bytes()


def test_domain_is_continued_after_a_reupload(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.age)
    again = pageferry.push_image(world.base, f"{world.url}/b", key=world.age, reupload=True)
    assert again.uploaded_blocks == again.blocks
    domains = {world.manifest(name, world.age).sealing.domain for name in "ab"}
    assert len(domains) == 1


def test_further_recipient_begins_a_new_domain(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.age)
    other = pyrage.x25519.Identity.generate()
    both = world.key("both", f"{world.identity}\n{other.to_public()}\n".encode())
    with pytest.raises(ImageError, match="this image, encrypted for other keys"):
        pageferry.push_image(world.base, f"{world.url}/a", key=both)
    second = pageferry.push_image(world.base, f"{world.url}/b", key=both)
    assert second.uploaded_blocks == second.blocks
    reader = world.key("reader", str(other).encode())
    with pytest.raises(WrongKey, match="does not open it"):
        world.pull("a", key=reader)
    assert world.pull(f"b@{second.manifest}", key=reader) == world.base.read_bytes()


# -- recipients


def test_image_pushed_with_a_recipient_requires_an_identity_and_the_digest(world: World) -> None:
    pushed = pageferry.push_image(world.base, f"{world.url}/a", key=world.recipient)
    with pytest.raises(WrongKey, match="does not open it"):
        world.pull("a", key=world.recipient)
    with pytest.raises(WrongKey, match=r"any user who knows the recipient can have encrypted it.*add @DIGEST"):
        world.pull("a", key=world.age)
    assert world.pull(f"a@{pushed.manifest}", key=world.age) == world.base.read_bytes()


def test_domain_that_anybody_can_have_created_is_not_continued(world: World) -> None:
    planted = pageferry.push_image(world.base, f"{world.url}/planted", key=world.recipient)
    pushed = pageferry.push_image(world.base, f"{world.url}/own", key=world.age)
    assert pushed.uploaded_blocks == pushed.blocks
    own = world.manifest("own", world.age).sealing.domain
    assert world.manifest(f"planted@{planted.manifest}", world.age).sealing.domain != own


# -- wrong and missing keys


def test_missing_and_wrong_keys_are_refused(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    for options in ({}, {"key": world.age}, {"key": world.key("k", bytes(32))}):
        with pytest.raises(WrongKey, match=f"cannot read {world.url}/a: it is encrypted"):
            world.pull("a", **options)
    with pytest.raises(ImageError, match="another image of this name"):
        pageferry.push_image(world.base, f"{world.url}/a")
    with pytest.raises(ImageError, match="another image of this name, or this image, encrypted for other keys"):
        pageferry.push_image(world.base, f"{world.url}/a", key=world.age)


def test_key_for_an_image_that_is_not_encrypted_is_refused(world: World) -> None:
    pageferry.push_image(world.child, f"{world.url}/child")
    with pytest.raises(WrongKey, match="it is not encrypted, although a key is given"):
        world.pull("child", key=world.raw)
    assert world.pull("child", key=world.raw, allow_plain=True) == world.child.read_bytes()
    with pytest.raises(ImageError, match="another image of this name"):  # it must not remain unencrypted
        pageferry.push_image(world.child, f"{world.url}/child", key=world.raw)


def test_restores_require_the_key_even_if_the_image_is_cached(world: World) -> None:
    url = f"{world.url}/day"
    pageferry.push_image(world.child, url, key=world.age)
    pageferry.restore(url, key=world.age).load()
    for path in world.objects("packs"):
        path.unlink()  # only the cached image can be restored from here on
    restored = pageferry.restore(url, key=world.age)
    assert np.frombuffer(memoryview(restored), "u8")[0] == 7
    refused: list[Any] = [{}, {"key": world.raw}]
    for options in refused:
        with pytest.raises(WrongKey):
            pageferry.restore(url, **options)
    (reference,) = world.objects("images")
    changed = msgspec.json.decode(reference.read_bytes())
    del changed["sealed"], changed["salt"]
    reference.write_bytes(msgspec.json.encode(changed))
    refused = [{}, {"key": world.age}]
    for options in refused:
        with pytest.raises(ImageError, match=r"it is encrypted|its reference was changed"):
            pageferry.restore(url, **options)


def test_blocks_are_fetched_with_keys_that_open_one_image_only(world: World) -> None:
    world.words[:] += 1
    pageferry.checkpoint(world.arena, world.folder / "other")
    for name, image in (("base", world.base), ("other", world.folder / "other")):
        pageferry.push_image(image, f"{world.url}/{name}", key=world.raw)
    restored = pageferry.restore(f"{world.url}/base", key=world.raw, prefetch=False)
    base, other = (world.manifest(name, world.raw) for name in ("base", "other"))
    assert isinstance(base.sealing, Domain)
    cached = b"".join(path.read_bytes() for path in (world.folder / "cache").rglob("*") if path.is_file())
    for record in base.records():
        assert base.sealing.block_key(record.digest) in cached
    for record in other.records():
        assert base.sealing.block_key(record.digest) not in cached
    for secret in (base.sealing.secret, world.raw.read_bytes()):
        assert secret not in cached
    restored.load()
    unchanged = slice(1 << 12, None)  # since the checkpoint, apart from the addition of 1
    assert (np.frombuffer(memoryview(restored), "u8")[unchanged] + 1 == world.words[unchanged]).all()


def test_changed_block_is_not_loaded_on_demand(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    restored = pageferry.restore(f"{world.url}/a", key=world.raw, prefetch=False)
    (pack,) = world.objects("packs")
    contents = bytearray(pack.read_bytes())
    contents[-20] ^= 1
    pack.write_bytes(contents)
    with pytest.raises(ImageError, match="does not match its digest"):
        restored.load()


def test_objects_are_loaded_from_an_encrypted_image(world: World) -> None:
    pageferry.dump({"x": np.arange(1000)}, world.folder / "object")
    pageferry.push_image(world.folder / "object", f"{world.url}/", key=world.raw)
    url = f"{world.url}/object"
    command = f"cat {world.raw}"
    assert pageferry.load(url, key_command=command)["x"].sum() == 499500
    assert list(pageferry.open_buffers(url, key=world.raw)) == list(pageferry.open_buffers(url, key_command=command))
    for function in (pageferry.load, pageferry.open_buffers):
        with pytest.raises(WrongKey):
            function(url)
        with pytest.raises(UsageError, match="`key` has no effect for the image file"):
            function(world.folder / "object", key=world.raw)


# -- users with write access to the store


def test_changed_byte_of_any_object_is_refused_or_has_no_effect(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    chance, expected, refused = random.Random(5), world.base.read_bytes(), 0
    for path in world.objects():
        contents = path.read_bytes()
        small = len(contents) < 1 << 16
        places = (
            chance.sample(range(len(contents)), 60)
            if small
            else [0, 70, len(contents) - 1, *(chance.randrange(len(contents)) for _ in range(12))]
        )
        for at in places:
            changed = bytearray(contents)
            changed[at] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            try:
                assert world.pull("a", key=world.raw) == expected
            except PageferryError:
                refused += 1
        path.write_bytes(contents)
    assert refused > 60
    assert world.pull("a", key=world.raw) == expected


@pytest.mark.parametrize("kind", ["images", "manifests", "packs"])
@pytest.mark.parametrize("change", ["truncate", "extend", "remove", "replace"])
def test_objects_that_were_replaced_are_refused(world: World, kind: str, change: str) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    target = world.folder / "target"
    target.write_bytes(b"earlier contents")
    (path,) = world.objects(kind)
    contents = path.read_bytes()
    changed = {"truncate": contents[:-20], "extend": contents + bytes(20), "replace": os.urandom(len(contents))}
    path.unlink() if change == "remove" else path.write_bytes(changed[change])
    if (kind, change) == ("packs", "extend"):  # no block refers to the additional bytes
        assert world.pull("a", key=world.raw) == world.base.read_bytes()
        return
    with pytest.raises(ImageError):
        pageferry.pull_image(f"{world.url}/a", target, key=world.raw)
    assert target.read_bytes() == b"earlier contents"
    assert not [path for path in world.folder.iterdir() if path.name.startswith(".")]


def test_blocks_cannot_be_exchanged_between_positions(world: World) -> None:
    image = world.folder / "image"
    pageferry.checkpoint(world.arena, image, codec="none")
    pageferry.push_image(image, f"{world.url}/a", key=world.raw)
    records = world.manifest("a", world.raw).records()
    first, second = [one for one in records if one.stored == max(one.stored for one in records)][:2]
    (pack,) = world.objects("packs")
    stored = bytearray(pack.read_bytes())
    one, two = (slice(record.start, record.start + record.stored) for record in (first, second))
    stored[one], stored[two] = stored[two], stored[one]
    pack.write_bytes(stored)
    with pytest.raises(ImageError, match="does not match its digest"):
        world.pull("a", key=world.raw)


def test_packs_cannot_be_exchanged_between_images(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    (first,) = world.objects("packs")
    world.words[:] += 1
    pageferry.checkpoint(world.arena, world.folder / "other")
    pageferry.push_image(world.folder / "other", f"{world.url}/b", key=world.raw)
    (second,) = set(world.objects("packs")) - {first}
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes().ljust(len(contents), b"\0"))
    second.write_bytes(contents)
    for name in "ab":
        with pytest.raises(ImageError, match="damaged, truncated or replaced"):
            world.pull(name, key=world.raw)


def test_references_cannot_be_exchanged_between_names(world: World) -> None:
    world.words[0] = 1
    pageferry.checkpoint(world.arena, world.folder / "other")
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    pageferry.push_image(world.folder / "other", f"{world.url}/b", key=world.raw)
    first, second = world.objects("images")
    contents = [path.read_bytes() for path in (first, second)]
    first.write_bytes(contents[1])
    with pytest.raises(ImageError, match=f"cannot read {world.url}/a: its reference was changed"):
        world.pull("a", key=world.raw)
    mixed = msgspec.json.decode(contents[0])
    mixed |= {name: msgspec.json.decode(contents[1])[name] for name in ("manifest", "manifest-length", "id")}
    first.write_bytes(msgspec.json.encode(mixed))  # the reference of this name, with the manifest of the other
    with pytest.raises(ImageError, match="its reference was changed"):
        world.pull("a", key=world.raw)
    assert f"{world.url}/images/a" in pageferry.list_images(world.url, key=world.raw).unreadable[0]


def test_name_that_was_set_to_an_older_image_is_refused_by_its_digest(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    (reference,) = world.objects("images")
    older = reference.read_bytes()
    pageferry.delete_image(f"{world.url}/a")
    world.words[0] = 1
    pageferry.checkpoint(world.arena, world.folder / "newer")
    newer = pageferry.push_image(world.folder / "newer", f"{world.url}/a", key=world.raw)
    url = f"{world.url}/a@{newer.manifest}"
    assert np.frombuffer(memoryview(pageferry.restore(url, key=world.raw)), "u8")[0] == 1
    reference.write_bytes(older)
    assert world.pull("a", key=world.raw) == world.base.read_bytes()  # without the digest, it is not noticed
    with pytest.raises(ImageError, match=f"not {newer.manifest}: the name was used again, or set to an older image"):
        world.pull(f"a@{newer.manifest}", key=world.raw)
    with pytest.raises(ImageError, match="the name was used again"):
        pageferry.restore(url, key=world.raw)


def test_digest_also_identifies_images_that_are_not_encrypted(world: World) -> None:
    pushed = pageferry.push_image(world.base, f"{world.url}/a")
    assert world.pull(f"a@{pushed.manifest}") == world.base.read_bytes()
    with pytest.raises(ImageError, match="the name was used again"):
        world.pull(f"a@{'0' * 64}")
    with pytest.raises(UsageError, match="remove @DIGEST"):
        pageferry.push_image(world.base, f"{world.url}/b@{pushed.manifest}")
    with pytest.raises(ImageError, match="the name was used again"):
        pageferry.delete_image(f"{world.url}/a@{'0' * 64}")
    pageferry.delete_image(f"{world.url}/a@{pushed.manifest}")
    assert pageferry.list_images(world.url).images == []


def test_outline_of_a_manifest_is_authenticated(world: World) -> None:
    """A user who changes the readable part of a manifest can also compute its new digest and change the reference."""
    pageferry.push_image(world.child, f"{world.url}/child", key=world.raw)
    (reference,) = world.objects("images")
    known = msgspec.json.decode(reference.read_bytes(), type=layout.Reference)
    stored = (world.folder / "store" / known.key).read_bytes()
    envelope = layout.decode_manifest(stored, known.manifest, "here")
    assert isinstance(envelope, layout.Envelope)
    outline = envelope.decoded("here")
    changed_fields: list[Any] = [
        {"packs": [layout.PackEntry(bytes(32), 99)]},
        {"ancestors": []},
        {"table": 0},
        {"salt": bytes(32)},
    ]
    for changes in changed_fields:
        changed = msgspec.msgpack.encode(msgspec.structs.replace(outline, **changes))
        body = msgspec.structs.replace(envelope, outline=changed)
        parts = stored[: -layout.tail_length(stored, len(stored))]
        data, digest = layout.encode_manifest(parts, body)
        (world.folder / "store" / layout.manifest_key(known.id, digest)).write_bytes(data)
        replaced = msgspec.structs.replace(known, manifest=digest, manifest_length=len(data))
        reference.write_bytes(msgspec.json.encode(replaced))
        with pytest.raises(ImageError, match="its directory cannot be decrypted"):
            world.pull("child", key=world.raw)


def test_manifest_of_a_parent_in_another_domain_is_refused(world: World) -> None:
    pageferry.push_image(world.child, f"{world.url}/child", key=world.raw)
    pageferry.push_image(world.base, f"{world.url}/other", key=world.age)
    pageferry.push_image(world.base, f"{world.url}/plain")
    store, child = Store(image_url("url", f"{world.url}/child").store), world.manifest("child", world.raw)
    for path in set(world.objects("manifests")):
        stored = asyncio.run(read_manifest(store, str(path.relative_to(world.folder / "store")), path.name))
        if stored.domain == child.sealing.domain:
            assert stored.open_in(child.sealing).directory.random
            continue
        with pytest.raises(ImageError, match="it belongs to another key domain than the image"):
            stored.open_in(child.sealing)


# -- other operations


def test_images_are_listed_with_and_without_the_key(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    pageferry.push_image(world.base, f"{world.url}/b")
    encrypted, plain = pageferry.list_images(world.url).images
    assert (encrypted.encrypted, encrypted.kind, encrypted.created, encrypted.digest) == (True, None, None, None)
    assert (plain.encrypted, plain.kind) == (False, "arena")
    described = pageferry.list_images(world.url, key=world.raw).images[0]
    assert (described.kind, described.digest, described.created) == (plain.kind, plain.digest, plain.created)
    assert pageferry.list_images(world.url, key=world.age).images[0] == encrypted


def test_garbage_is_collected_without_the_key(world: World) -> None:
    pageferry.push_image(world.child, f"{world.url}/child", key=world.raw)
    pageferry.push_image(world.base, f"{world.url}/base", key=world.raw)
    other = world.folder / "other"
    world.words[:] += 1
    pageferry.checkpoint(world.arena, other)
    pageferry.push_image(other, f"{world.url}/other", key=world.raw)
    for name in ("base", "other"):
        pageferry.delete_image(f"{world.url}/{name}")
    for _ in range(2):
        world.age_objects()
        found = pageferry.collect_garbage(world.url, grace="1h")
    assert found.deleted == 2  # manifest and pack of the other image
    assert world.pull("child", key=world.raw) == world.child.read_bytes()


def test_readers_without_encryption_refuse_encrypted_images_by_the_feature(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    monkeypatch.setattr(layout, "FEATURES", 0)  # as in a reader that does not know the feature
    with pytest.raises(ImageError, match="unsupported features 0x1; use the release that wrote it"):
        world.pull("a", key=world.raw)
    with pytest.raises(ImageError, match="unsupported features 0x1"):
        pageferry.collect_garbage(world.url)


def test_images_that_are_not_encrypted_keep_their_format(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a")
    (reference,), (manifest,) = world.objects("images"), world.objects("manifests")
    fields = {"format", "version", "manifest", "manifest-length", "id", "digest", "kind", "workload", "created"}
    assert set(msgspec.json.decode(reference.read_bytes())) == fields | {"length", "parents"}
    assert layout.TRAILER_HEAD.unpack_from(manifest.read_bytes()[-layout.TRAILER :])[1:4] == (1, 0, 0)
    (pack,) = world.objects("packs")
    assert layout.PACK_HEADER.unpack_from(pack.read_bytes())[1:4] == (1, 0, 0)


def test_no_key_and_nonce_are_used_twice_in_a_store(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    used: dict[tuple[bytes, bytes], bytes] = {}

    class Recorder(library.Aead):
        def __init__(self, key: bytes) -> None:
            super().__init__(key)
            self.key = key

        def encrypt(self, nonce: bytes, data: bytes | bytearray, bound: bytes) -> bytes:
            assert used.setdefault((self.key, nonce), bytes(data)) == data
            return super().encrypt(nonce, data, bound)

    for module in ("keys", "sealing"):
        monkeypatch.setattr(f"pageferry.stores.{module}.Aead", Recorder)
    for name, image, key in (("a", world.base, world.raw), ("b", world.child, world.raw), ("c", world.base, world.age)):
        pageferry.push_image(image, f"{world.url}/{name}", key=key)
    for number in range(3):
        world.words[number << 17] += 1
        pageferry.checkpoint(world.arena, world.folder / f"{number}")
        pageferry.push_image(world.folder / f"{number}", f"{world.url}/{number}", key=world.raw)
    assert len(used) > 30


# -- the command


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command, and returns its exit code and outputs."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([*map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_commands_take_a_key_or_a_command(world: World, command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = command("image", "push", world.base, f"{world.url}/a", "--key", world.raw)
    assert (code, "encrypted" in out) == (0, True)
    pinned = out.splitlines()[-1]
    assert pinned.startswith(f"{world.url}/a@")
    target = world.folder / "copy"
    assert command("image", "pull", pinned, target, "--key-command", f"cat {world.raw}")[0] == 0
    assert target.read_bytes() == world.base.read_bytes()
    assert "encrypted" in command("image", "list", world.url)[1]
    assert "arena (arena)" in command("image", "list", world.url, "--key", world.raw)[1]
    code, _, err = command("image", "pull", f"{world.url}/a", target)
    assert (code, "give its key with --key or --key-command" in err) == (35, True)
    code, _, err = command("image", "pull", f"{world.url}/a@{'0' * 64}", target, "--key", world.raw)
    assert (code, "set to an older image" in err) == (31, True)
    code, _, err = command("image", "pull", f"{world.url}/a", target, "--key", world.raw, "--key-command", "true")
    assert (code, "--key cannot be combined with --key-command" in err) == (2, True)
    code, _, err = command("image", "push", world.base, f"{world.url}/b", "--key", world.folder / "none")
    assert (code, "cannot read the key in" in err) == (2, True)


def test_guests_are_not_started_without_the_key(world: World, command: Callable[..., tuple[int, str, str]]) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    pageferry.push_image(world.base, f"{world.url}/b")
    qemu = ("--", "qemu-system-x86_64")
    for verb in (("restore", "web"), ("clone",)):
        for name, given in (("a", ()), ("a", ("--key", world.age)), ("b", ("--key", world.raw))):
            code, _, err = command(*verb, f"{world.url}/{name}", *given, *qemu)
            assert (code, f"cannot read {world.url}/{name}" in err) == (35, True)
        code, _, err = command(*verb, world.base, "--key", world.raw, *qemu)
        assert (code, "--key has no effect for the image file" in err) == (2, True)
        code, _, err = command(*verb, f"{world.url}/b", "--allow-plain", *qemu)
        assert (code, "--allow-plain has no effect without --key" in err) == (2, True)


def test_parent_is_the_image_with_the_given_digest(world: World) -> None:
    pushed = pageferry.push_image(world.base, f"{world.url}/a")
    with pytest.raises(ImageError, match="the name was used again"):
        pageferry.checkpoint(world.arena, f"{world.url}/child", parent=f"{world.url}/a@{'0' * 64}")
    with pytest.raises(ImageError, match="the name was used again"):
        pageferry.serve(f"{world.url}/a@{'0' * 64}", firecracker=world.folder / "socket")
    pageferry.checkpoint(world.arena, f"{world.url}/child", parent=f"{world.url}/a@{pushed.manifest}")
    assert {image.name: image.parents for image in pageferry.list_images(world.url).images} == {"a": 0, "child": 1}


def test_cached_file_of_an_encrypted_image_is_not_flattened_without_encryption(world: World) -> None:
    pageferry.push_image(world.base, f"{world.url}/a", key=world.raw)
    pageferry.restore(f"{world.url}/a", key=world.raw).load()
    (entry,) = pageferry.list_cache().images
    with pytest.raises(WrongKey, match="would not be encrypted"):
        pageferry.flatten_image(entry.path, f"{world.url}/b")
    assert [image.name for image in pageferry.list_images(world.url).images] == ["a"]
    pageferry.flatten_image(entry.path, f"{world.url}/b", key=world.raw)
