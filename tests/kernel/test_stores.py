"""Images in stores: transfers, reuse, deletion, garbage collection and crashes, with a directory as the store."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.errors import ImageError, StoreError, UsageError
from pageferry.images.image import ImageFile
from pageferry.stores import blocks, contents, layout, push
from pageferry.stores.address import image_url
from pageferry.stores.keys import NO_KEYS
from pageferry.stores.options import PushOptions
from pageferry.stores.push import Push
from pageferry.stores.sources import file_sources
from pageferry.stores.store import Store

SIZE = 24 << 20
PAGE = 4096


@pytest.fixture
def arena() -> pageferry.Arena:
    """Return an arena, 20 MiB of which are random."""
    arena = pageferry.Arena(SIZE)
    words(arena)[: 20 << 17] = np.random.default_rng(1).integers(0, 1 << 63, 20 << 17, dtype="u8")
    return arena


@pytest.fixture
def chain(arena: pageferry.Arena, tmp_path: Path) -> tuple[Path, Path]:
    """Return an image of the arena, and an incremental image."""
    (tmp_path / "images").mkdir()
    base, child = tmp_path / "images" / "base", tmp_path / "images" / "child"
    pageferry.checkpoint(arena, base, track=True)
    words(arena)[: 1 << 12] = 7
    pageferry.checkpoint(arena, child, parent=base)
    return base, child


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a store."""
    return f"file://{tmp_path}/store"


def words(arena: pageferry.Arena) -> Any:
    return np.frombuffer(memoryview(arena), "u8")


def objects(url: str, kind: str) -> list[Path]:
    return sorted(path for path in (folder(url) / kind).rglob("*") if path.is_file())


def folder(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def age(url: str, seconds: float = 7200.0) -> None:
    """Set the modification times of all objects to an earlier time."""
    then = time.time() - seconds
    for path in folder(url).rglob("*"):
        os.utime(path, (then, then))


def collect(url: str) -> Any:
    return pageferry.collect_garbage(url, grace="1h")


def test_pulled_images_equal_the_pushed_ones(chain: tuple[Path, Path], url: str, tmp_path: Path) -> None:
    base, child = chain
    pushed = pageferry.push_image(child, f"{url}/day")
    assert (pushed.parents, pushed.existed) == (1, False)
    assert pushed.uploaded < base.stat().st_size + child.stat().st_size
    (tmp_path / "pulled").mkdir()
    target = tmp_path / "pulled" / "today"
    pulled = pageferry.pull_image(f"{url}/day", target)
    assert pulled.parents == [str(tmp_path / "pulled" / "base")]
    assert (tmp_path / "pulled" / "base").read_bytes() == base.read_bytes()
    assert target.read_bytes() == child.read_bytes()
    assert pageferry.verify_image(target).intact
    again = pageferry.pull_image(f"{url}/day", target)  # the parent is in place
    assert (again.parents, again.length) == ([], child.stat().st_size)


def test_upload_contains_only_missing_blocks(arena: pageferry.Arena, url: str, tmp_path: Path) -> None:
    pageferry.checkpoint(arena, tmp_path / "one", mode="stop")
    first = pageferry.push_image(tmp_path / "one", f"{url}/")
    words(arena)[1 << 20] += 1
    pageferry.checkpoint(arena, tmp_path / "two", mode="stop")
    second = pageferry.push_image(tmp_path / "two", f"{url}/")
    assert first.uploaded_blocks == first.blocks == second.blocks > 10
    assert second.uploaded_blocks == 1
    assert second.uploaded < first.uploaded / 5
    pageferry.pull_image(f"{url}/two", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "two").read_bytes()
    assert [image.name for image in pageferry.list_images(url).images] == ["one", "two"]


def test_index_depends_on_stored_pages_not_on_the_address_space(url: str, tmp_path: Path) -> None:
    arena = pageferry.Arena(4 << 30)
    words(arena)[5 << 20] = 1
    pageferry.checkpoint(arena, tmp_path / "sparse")
    pushed = pageferry.push_image(tmp_path / "sparse", f"{url}/")
    assert (tmp_path / "sparse").stat().st_size > 16 << 20
    assert pushed.uploaded < 64 << 10
    pageferry.pull_image(f"{url}/sparse", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "sparse").read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20


def test_repeated_push_uploads_nothing_and_names_are_not_reused(chain: tuple[Path, Path], url: str) -> None:
    base, child = chain
    pageferry.push_image(base, f"{url}/a")
    before = objects(url, "")
    assert pageferry.push_image(base, f"{url}/a").existed
    with pytest.raises(ImageError, match="another image of this name"):
        pageferry.push_image(child, f"{url}/a")
    assert objects(url, "") == before
    assert pageferry.push_image(child, f"{url}/b").parents == 0  # the store has the parent


def test_damaged_image_is_not_uploaded(chain: tuple[Path, Path], url: str) -> None:
    base, _ = chain
    with open(base, "r+b") as file:
        file.seek(10 << 20)
        file.write(bytes(64))
    with pytest.raises(ImageError, match="damaged"):
        pageferry.push_image(base, f"{url}/a")
    assert objects(url, "packs") == []


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def _flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _exchange(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(path.stat().st_size))


@pytest.mark.parametrize("change", [_cut, _flip, _exchange, Path.unlink])
@pytest.mark.parametrize("kind", ["images", "manifests", "packs"])
def test_changed_objects_are_reported_and_the_target_is_kept(
    chain: tuple[Path, Path], url: str, tmp_path: Path, change: Callable[[Path], object], kind: str
) -> None:
    pageferry.push_image(chain[0], f"{url}/a")
    change(objects(url, kind)[0])
    target = tmp_path / "target"
    target.write_bytes(b"earlier contents")
    with pytest.raises(ImageError) as caught:
        pageferry.pull_image(f"{url}/a", target)
    assert f"{url}/a" in str(caught.value) or f"/{kind}/" in str(caught.value)
    assert target.read_bytes() == b"earlier contents"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "store", "target"]


@pytest.mark.parametrize("change", [_cut, Path.unlink])
def test_missing_and_truncated_packs_are_not_reused(
    chain: tuple[Path, Path], url: str, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    base, child = chain
    pageferry.push_image(base, f"{url}/a")
    change(objects(url, "packs")[0])
    again = pageferry.push_image(child, f"{url}/b")
    assert (again.parents, again.uploaded_blocks) == (1, again.blocks)
    pageferry.pull_image(f"{url}/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == child.read_bytes()


def test_reupload_replaces_damaged_contents(chain: tuple[Path, Path], url: str, tmp_path: Path) -> None:
    base, child = chain
    pageferry.push_image(child, f"{url}/a")
    for pack in objects(url, "packs"):
        _flip(pack)
    with pytest.raises(ImageError, match="--reupload"):
        pageferry.pull_image(f"{url}/a", tmp_path / "copy")
    again = pageferry.push_image(child, f"{url}/b", reupload=True)
    assert (again.parents, again.uploaded_blocks) == (1, again.blocks)
    pageferry.pull_image(f"{url}/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == child.read_bytes()
    assert (tmp_path / "base").read_bytes() == base.read_bytes()


def test_child_is_not_reused_if_the_packs_of_its_parent_are_condemned(
    chain: tuple[Path, Path], url: str, tmp_path: Path
) -> None:
    base, child = chain
    pageferry.push_image(base, f"{url}/base")
    (condemned,) = objects(url, "packs")
    pageferry.push_image(child, f"{url}/old")
    for name in ("base", "old"):
        pageferry.delete_image(f"{url}/{name}")
    mark = folder(url) / "condemned" / "packs" / condemned.name  # a collection was killed while it marked objects
    mark.parent.mkdir(parents=True)
    mark.touch()
    pageferry.push_image(child, f"{url}/new")
    condemned.unlink()
    pageferry.pull_image(f"{url}/new", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == child.read_bytes()


def test_collection_names_an_object_that_is_not_a_reference(chain: tuple[Path, Path], url: str) -> None:
    pageferry.push_image(chain[0], f"{url}/a")
    (folder(url) / "images" / "notes.txt").write_text("not a reference")
    with pytest.raises(ImageError, match=r"images/notes.txt needs are not known: .*; delete the images"):
        collect(url)


def test_other_file_with_the_name_of_a_parent_is_kept(chain: tuple[Path, Path], url: str, tmp_path: Path) -> None:
    pageferry.push_image(chain[1], f"{url}/a")
    (tmp_path / "base").write_bytes(b"something else")
    with pytest.raises(ImageError, match="another file of this name"):
        pageferry.pull_image(f"{url}/a", tmp_path / "child")
    with pytest.raises(UsageError, match=r"a parent of .* needs this name"):
        pageferry.pull_image(f"{url}/a", tmp_path / "base")
    assert (tmp_path / "base").read_bytes() == b"something else"
    assert not (tmp_path / "child").exists()


def test_deleted_parent_is_kept_for_its_children(chain: tuple[Path, Path], url: str, tmp_path: Path) -> None:
    base, child = chain
    pageferry.push_image(base, f"{url}/base")
    pageferry.push_image(child, f"{url}/child")
    assert pageferry.delete_image(f"{url}/base").image == f"{url}/base"
    for _ in range(3):
        age(url)
        assert (collect(url).condemned, collect(url).deleted) == (0, 0)
    pageferry.pull_image(f"{url}/child", tmp_path / "child")
    assert pageferry.compare_images(child, tmp_path / "child").same
    with pytest.raises(ImageError, match="no image of this name"):
        pageferry.delete_image(f"{url}/base")


def test_garbage_is_marked_and_deleted_after_the_grace_period(chain: tuple[Path, Path], url: str) -> None:
    base, _ = chain
    pushed = pageferry.push_image(base, f"{url}/a")
    pageferry.delete_image(f"{url}/a")
    recent = collect(url)
    assert (recent.kept, recent.condemned, recent.deleted) == (2, 0, 0)  # it may be an upload in progress
    age(url)
    marked = collect(url)
    assert (marked.condemned, marked.condemned_bytes, marked.deleted) == (2, pushed.uploaded, 0)
    assert collect(url).deleted == 0  # the marks are recent
    age(url)
    swept = collect(url)
    assert (swept.deleted, swept.freed, swept.kept) == (2, pushed.uploaded, 0)
    assert objects(url, "") == []


def test_collection_leaves_other_files_of_the_directory(chain: tuple[Path, Path], url: str) -> None:
    pageferry.push_image(chain[0], f"{url}/a")
    other, incomplete = folder(url) / "report#1", folder(url) / "packs" / "pack#1"
    other.write_text("not of the store")
    incomplete.write_text("left by a killed upload")
    age(url)
    for path in (other, incomplete):
        os.utime(path, (1, 1))
    collect(url)
    assert (other.exists(), incomplete.exists()) == (True, False)


def test_collection_keeps_marks_of_objects_that_only_an_upload_needs(chain: tuple[Path, Path], url: str) -> None:
    """Another collection may have decided to delete the object: the upload must find its mark."""
    pageferry.push_image(chain[0], f"{url}/a")
    pageferry.delete_image(f"{url}/a")
    age(url)
    collect(url)
    marks = objects(url, "condemned")
    os.utime(next(path for path in (folder(url) / "manifests").rglob("*") if path.is_file()))  # a recent manifest
    collect(url)
    assert objects(url, "condemned") == marks


def test_upload_does_not_reuse_condemned_objects(chain: tuple[Path, Path], url: str, tmp_path: Path) -> None:
    base, _ = chain
    pageferry.push_image(base, f"{url}/a")
    pageferry.delete_image(f"{url}/a")
    age(url)
    assert collect(url).condemned == 2
    again = pageferry.push_image(base, f"{url}/a")
    assert again.uploaded_blocks == again.blocks > 0
    age(url)
    assert collect(url).deleted == 2
    pageferry.pull_image(f"{url}/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == base.read_bytes()


class _Collecting(Push):
    """Upload during which the image whose blocks it reuses is deleted, and a collection marks them."""

    interruptions = 1

    async def _upload_chain(self, known: contents.Contents) -> Any:
        manifest = await super()._upload_chain(known)
        if self.interruptions:
            self.interruptions -= 1
            store = str(self._url.store)
            if (folder(store) / "images" / "old").exists():
                await pageferry.delete_image_async(f"{store}/old")
            age(store)
            await pageferry.collect_garbage_async(store, grace="1h")
        return manifest


@pytest.mark.parametrize("interruptions", [1, 2, push.ATTEMPTS])
def test_upload_notices_a_collection_at_the_same_time(
    chain: tuple[Path, Path], url: str, tmp_path: Path, interruptions: int
) -> None:
    base, _ = chain
    pageferry.push_image(base, f"{url}/old")

    async def upload() -> Any:
        target = image_url("url", f"{url}/new")
        sources = file_sources(ImageFile(base), NO_KEYS)
        upload = _Collecting(push.Destination(Store(target.store), target), sources, lambda _: None, PushOptions())
        upload.interruptions = interruptions
        return await upload.run()

    if interruptions == push.ATTEMPTS:
        with pytest.raises(StoreError, match="garbage collections delete objects"):
            asyncio.run(upload())
        return
    asyncio.run(upload())
    for _ in range(2):
        age(url)
        collect(url)
    assert len(objects(url, "manifests")) == 1
    pageferry.pull_image(f"{url}/new", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == base.read_bytes()


def test_collection_stops_if_a_manifest_cannot_be_read(chain: tuple[Path, Path], url: str) -> None:
    pageferry.push_image(chain[0], f"{url}/a")
    manifest = objects(url, "manifests")[0]
    _flip(manifest)
    _cut(manifest)
    age(url)
    with pytest.raises(ImageError, match="are not known"):
        collect(url)
    assert len(objects(url, "packs")) == 1
    assert objects(url, "condemned") == []


@pytest.fixture
def killed(tmp_path: Path) -> Callable[..., None]:
    """Return a function that runs a command, which kills itself at a fault point."""

    def run(point: str, *arguments: object) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pageferry", *map(str, arguments)],
            env=os.environ | {"PAGEFERRY_FAULT": f"{point}=kill"},
            timeout=60,
        )
        assert done.returncode == -9

    return run


def test_killed_upload_leaves_no_image_and_only_garbage(
    chain: tuple[Path, Path], url: str, killed: Callable[..., None]
) -> None:
    base, child = chain
    pageferry.push_image(base, f"{url}/base")
    kept = len(objects(url, ""))
    killed("store.uploaded", "image", "push", child, f"{url}/child")
    assert [image.name for image in pageferry.list_images(url).images] == ["base"]
    assert len(objects(url, "")) > kept
    for _ in range(2):
        age(url)
        collect(url)
    assert len(objects(url, "")) == kept
    killed("store.published", "image", "push", child, f"{url}/child")
    assert pageferry.push_image(child, f"{url}/child").existed


@pytest.mark.parametrize("point", ["store.marked", "store.swept"])
def test_killed_collection_is_continued_by_the_next(
    chain: tuple[Path, Path], url: str, tmp_path: Path, killed: Callable[..., None], point: str
) -> None:
    base, child = chain
    pageferry.push_image(base, f"{url}/base")
    pageferry.push_image(child, f"{url}/child")
    pageferry.delete_image(f"{url}/child")
    age(url)
    collect(url)
    age(url)
    killed(point, "image", "gc", url, "--grace", "1h")
    age(url)
    collect(url)
    assert len(objects(url, "")) == 3  # reference, manifest and pack of the base
    pageferry.pull_image(f"{url}/base", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == base.read_bytes()


def test_killed_download_leaves_the_target(
    chain: tuple[Path, Path], url: str, tmp_path: Path, killed: Callable[..., None]
) -> None:
    pageferry.push_image(chain[0], f"{url}/a")
    target = tmp_path / "target"
    target.write_bytes(b"earlier contents")
    killed("store.downloaded", "image", "pull", f"{url}/a", target)
    assert target.read_bytes() == b"earlier contents"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "store", "target"]


def test_cancelled_upload_publishes_nothing(chain: tuple[Path, Path], url: str) -> None:
    async def cancel() -> None:
        def stop(_: object) -> None:
            task.cancel()

        task = asyncio.ensure_future(pageferry.push_image_async(chain[0], f"{url}/a", listener=stop))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert pageferry.list_images(url).images == []


@pytest.fixture
def spoken(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command, and returns its exit code and outputs."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([*map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_commands_copy_list_and_delete(
    chain: tuple[Path, Path], url: str, tmp_path: Path, spoken: Callable[..., tuple[int, str, str]]
) -> None:
    _, child = chain
    code, out, _ = spoken("image", "push", child, f"{url}/")
    assert code == 0
    assert "1 parents" in out
    assert "already in the store" in spoken("image", "push", child, f"{url}/child")[1]
    assert "child" in spoken("image", "list", url)[1]
    code, out, _ = spoken("image", "pull", f"{url}/child", tmp_path / "base2")
    assert code == 0
    assert f"{tmp_path}/base: parent" in out
    assert spoken("image", "delete", f"{url}/child")[1] == f"deleted {url}/child\n"
    assert "2 unneeded but recent" not in spoken("image", "gc", url)[1]
    code, _, err = spoken("image", "gc", url, "--grace", "1s")
    assert (code, "--grace" in err) == (2, True)
    code, _, err = spoken("image", "pull", f"{url}/none", tmp_path / "x")
    assert (code, "the store has no image of this name" in err) == (31, True)
    code, _, err = spoken("image", "list", f"file://{tmp_path}/nowhere")
    assert (code, "is not a directory" in err) == (34, True)


def hostile(url: str, **changes: Any) -> None:
    """Replace the manifest of the image `a` by one with changed fields and a valid digest, and its reference."""
    path = objects(url, "manifests")[0]
    directory = layout.decode_manifest(path.read_bytes(), path.name, "")
    assert isinstance(directory, layout.Directory)
    parts = path.read_bytes()[: directory.blocks.offset + directory.blocks.length]
    data, found = layout.encode_manifest(parts, msgspec.structs.replace(directory, **changes))
    (path.parent / found).write_bytes(data)
    reference = folder(url) / "images" / "a"
    earlier = layout.decode_reference(reference.read_bytes(), "")
    changed = msgspec.structs.replace(earlier, manifest=found, manifest_length=len(data))
    reference.write_bytes(msgspec.json.encode(changed))


ENTRY = layout.PackEntry(bytes(32), 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 1 << 32}, "storage blocks, expected at most"),
        ({"count": blocks.MAX_BLOCKS}, "the table of .* has only"),
        ({"packs": [ENTRY] * (layout.MAX_ENTRIES + 1)}, "its directory is invalid"),
    ],
)
def test_hostile_manifest_is_refused_before_memory_is_allocated(
    chain: tuple[Path, Path], url: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pageferry.push_image(chain[0], f"{url}/a")
    hostile(url, **changes)
    with pytest.raises(ImageError, match=message):
        pageferry.pull_image(f"{url}/a", tmp_path / "copy")
    pageferry.push_image(chain[0], f"{url}/b")  # reuses nothing of it


def test_manifests_of_a_chain_are_bounded_together(
    chain: tuple[Path, Path], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pageferry.push_image(chain[1], f"{url}/a")
    lengths = [path.stat().st_size for path in objects(url, "manifests")]
    monkeypatch.setattr(layout, "MAX_MANIFESTS", sum(lengths) - 1)
    with pytest.raises(ImageError, match="it and its ancestors have more than"):
        pageferry.pull_image(f"{url}/a", tmp_path / "copy")
    monkeypatch.setattr(layout, "MAX_MANIFESTS", sum(lengths))
    monkeypatch.setattr(blocks, "MAX_BLOCKS", 19)
    with pytest.raises(ImageError, match=r"it and its ancestors have .* storage blocks"):
        pageferry.pull_image(f"{url}/a", tmp_path / "copy")


def test_slow_listing_of_marks_counts_for_the_time_limit_of_the_publication(
    chain: tuple[Path, Path], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_: object) -> set[str]:
        await asyncio.sleep(30)
        return set()

    monkeypatch.setattr(contents.Contents, "unavailable", slow)
    monkeypatch.setattr(push, "PUBLISH_TIMEOUT", 0.2)
    with pytest.raises(StoreError, match="did not reply within"):
        pageferry.push_image(chain[0], f"{url}/a")
    assert pageferry.list_images(url).images == []


def test_parent_appears_only_with_its_child(
    arena: pageferry.Arena, chain: tuple[Path, Path], url: str, tmp_path: Path
) -> None:
    pageferry.push_image(chain[1], f"{url}/parents")
    words(arena)[1 << 20] += 1
    child = chain[0].parent / "third"
    pageferry.checkpoint(arena, child, parent=chain[1])
    known = set(objects(url, "packs"))
    pageferry.push_image(child, f"{url}/child")
    (other,) = set(objects(url, "packs")) - known
    _flip(other)
    target = tmp_path / "pulled" / "third"
    target.parent.mkdir()
    with pytest.raises(ImageError, match="damaged"):
        pageferry.pull_image(f"{url}/child", target)
    assert list(target.parent.iterdir()) == []


def test_interrupted_upload_is_continued(
    chain: tuple[Path, Path], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(layout, "PACK_LENGTH", 4 << 20)

    def fail(point: str) -> None:
        if point == "store.uploaded":
            raise OSError("as if the process were killed")

    with monkeypatch.context() as patch:
        patch.setattr(push, "fault_point", fail)
        with pytest.raises(OSError, match="killed"):
            pageferry.push_image(chain[1], f"{url}/a")
    packs = objects(url, "packs")
    packs[0].unlink()  # a collection has deleted it
    journal = tmp_path / "cache" / "uploads"
    assert len([path for path in journal.rglob("*") if path.is_file()]) == len(packs)
    again = pageferry.push_image(chain[1], f"{url}/a")
    assert 0 < again.uploaded_blocks <= 4
    assert [path for path in journal.rglob("*") if path.is_file()] == [journal_of(journal, packs[0])]
    pageferry.pull_image(f"{url}/a", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == chain[1].read_bytes()
    assert (tmp_path / "base").read_bytes() == chain[0].read_bytes()


def journal_of(journal: Path, pack: Path) -> Path:
    """Return the path of the entry of a pack in a journal with one store."""
    return next(journal.iterdir()) / pack.name
