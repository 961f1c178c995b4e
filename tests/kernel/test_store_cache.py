"""Restores from the URL of an image: the cache of images on a host."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.errors import ImageError, UsageError
from pageferry.images.image import ImageFile, damaged_sections, open_link
from pageferry.stores.address import image_url
from pageferry.stores.cache import ImageCache
from pageferry.stores.sources import FileSource
from tests.kernel.programs import Program, wait_until

SIZE = 4 << 20


def words(arena: Any) -> Any:
    """Return the memory of an arena as an array."""
    return np.frombuffer(memoryview(arena), "u8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of the cache, which the environment names."""
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a store with the images `base` and `child`, and `other`."""
    arena = pageferry.Arena(SIZE)
    words(arena)[:] = np.random.default_rng(1).integers(0, 1 << 63, SIZE // 8, dtype="u8")
    store = f"file://{tmp_path}/store"
    pageferry.checkpoint(arena, tmp_path / "base", track=True)
    words(arena)[0] = 1
    pageferry.checkpoint(arena, tmp_path / "child", parent=tmp_path / "base")
    words(arena)[0] = 2
    pageferry.checkpoint(arena, tmp_path / "other")
    for name in ("base", "child", "other"):
        pageferry.push_image(tmp_path / name, f"{store}/{name}")
    return store


def packs_are_missing(url: str) -> None:
    """Remove the packs: only cached images can be restored from then on."""
    for path in (Path(url.removeprefix("file://")) / "packs").iterdir():
        path.unlink()


def complete(number: int = 1) -> None:
    """Wait until the images of the cache are complete, and restore without their store."""
    deadline = time.monotonic() + 60
    while sum(image.complete for image in pageferry.list_cache().images) < number:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def damage_section(image: Path) -> None:
    """Damage a section of an image other than its index and its metadata, as a crash can."""
    offset, length = max(ImageFile(image).image.blocks)
    with image.open("r+b") as file:
        for at in range(-(-(offset + length) // 4096) * 4096, image.stat().st_size, 4096):
            file.seek(at)
            (byte,) = file.read(1)
            for value in (byte ^ 1, byte):
                file.seek(at)
                file.write(bytes([value]))
                file.flush()
                with contextlib.suppress(ImageError):
                    if damaged_sections(open_link(image)):
                        return
    raise AssertionError(f"{image} has no section to damage")


def test_arena_is_restored_from_a_url_and_then_from_the_cache(url: str, cache: Path) -> None:
    arena = pageferry.restore(f"{url}/child")
    assert words(arena)[0] == 1
    complete()
    packs_are_missing(url)
    again = pageferry.restore(f"{url}/child")
    assert words(again)[0] == 1
    assert (words(again) == words(arena)).all()
    (entry,) = pageferry.list_cache().images
    assert (entry.url, Path(entry.path).name) == (f"{url}/child", "child")
    with pytest.raises(ImageError, match="is missing"):
        pageferry.restore(f"{url}/other", prefetch=False).load()


def test_objects_are_loaded_from_a_url(tmp_path: Path) -> None:
    pageferry.dump({"x": np.arange(1000)}, tmp_path / "object")
    pageferry.push_image(tmp_path / "object", f"file://{tmp_path}/store/")
    loaded = pageferry.load(f"file://{tmp_path}/store/object")
    assert loaded["x"].sum() == 499500


def test_parents_are_shared_between_entries(url: str) -> None:
    pageferry.restore(f"{url}/base").load()
    alone = pageferry.list_cache().length
    pageferry.restore(f"{url}/child").load()
    assert pageferry.list_cache().length < alone * 1.2


def test_damaged_entry_is_downloaded_again(url: str) -> None:
    pageferry.restore(f"{url}/other").load()
    complete()
    (entry,) = pageferry.list_cache().images
    os.truncate(entry.path, 100)
    assert words(pageferry.restore(f"{url}/other"))[0] == 2


def test_image_that_cannot_be_opened_is_refused(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def unchecked(_source: FileSource) -> None:
        pass

    pageferry.dump({"x": np.arange(1000)}, tmp_path / "object")
    state = ImageFile(tmp_path / "object").state()
    contents = (tmp_path / "object").read_bytes()
    assert contents.count(state) == 1
    (tmp_path / "object").write_bytes(contents.replace(state, bytes(byte ^ 1 for byte in state)))
    monkeypatch.setattr(FileSource, "check", unchecked)  # another program may have uploaded the image
    pageferry.push_image(tmp_path / "object", f"file://{tmp_path}/store/object")

    async def obtain() -> None:
        wanted = image_url("url", f"file://{tmp_path}/store/object")
        await asyncio.wait_for(ImageCache(cache, 1 << 30).obtain(wanted), 30)

    with pytest.raises(ImageError, match=r"its files in the cache cannot be opened: .*section"):
        asyncio.run(obtain())


def test_damaged_parent_is_not_shared(url: str, cache: Path) -> None:
    opened = ImageCache(cache, 1 << 30)
    base = asyncio.run(opened.obtain(image_url("url", f"{url}/base")))
    damage_section(base.path)
    base.close()

    async def obtain() -> None:
        (await asyncio.wait_for(opened.obtain(image_url("url", f"{url}/child")), 30)).close()

    asyncio.run(obtain())


def test_least_recently_used_entries_are_removed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEFERRY_CACHE_SIZE", "6M")
    pageferry.restore(f"{url}/base").load()
    pageferry.restore(f"{url}/other").load()
    assert [image.url for image in pageferry.list_cache().images] == [f"{url}/other"]
    monkeypatch.setenv("PAGEFERRY_CACHE_SIZE", "much")
    with pytest.raises(UsageError, match="PAGEFERRY_CACHE_SIZE"):
        pageferry.restore(f"{url}/base")


def test_entries_in_use_are_kept(url: str, cache: Path) -> None:
    used: list[str] = []
    opened = ImageCache(cache, 1 << 30, lambda: used)
    entry = asyncio.run(opened.obtain(image_url("url", f"{url}/base")))
    assert opened.clear().removed == []
    entry.close()
    used.append(str(entry.path))
    assert len(opened.clear().kept) == 1
    used.clear()
    assert len(opened.clear().removed) == 1
    assert not entry.path.exists()


def test_entry_that_a_restore_has_just_opened_is_kept(url: str, cache: Path) -> None:
    """The restore records its image, and then releases the lock."""
    entry = asyncio.run(ImageCache(cache, 1 << 30).obtain(image_url("url", f"{url}/base")))
    entry.close()

    def in_use() -> list[str]:
        lock = os.open(cache / "locks" / entry.path.parent.parent.name, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return [str(entry.path)]
        finally:
            os.close(lock)
        return []  # the restore has not recorded its image yet

    assert ImageCache(cache, 1 << 30, in_use).clear().removed == []
    assert entry.path.exists()


def test_restores_at_the_same_time_create_one_entry(url: str, cache: Path) -> None:
    opened = ImageCache(cache, 1 << 30)

    async def obtain() -> list[Any]:
        wanted = image_url("url", f"{url}/child")
        return await asyncio.gather(*(opened.obtain(wanted) for _ in range(4)))

    entries = asyncio.run(obtain())
    assert len({entry.path for entry in entries}) == 1
    for entry in entries:
        entry.close()


def test_killed_creation_leaves_no_entry(url: str, cache: Path) -> None:
    program = f"import pageferry; pageferry.restore({url + '/base'!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PAGEFERRY_FAULT": "store.written=kill"}, timeout=60
    )
    assert done.returncode == -9
    assert pageferry.list_cache().images == []
    assert len(list((cache / "images").iterdir())) == 1
    pageferry.clear_cache()
    assert list((cache / "images").iterdir()) == []
    assert words(pageferry.restore(f"{url}/base")).size


def test_directory_of_another_user_is_refused(url: str, cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    cache.chmod(0o777)
    with pytest.raises(UsageError, match="other users can write to it"):
        pageferry.restore(f"{url}/base")


def test_command_lists_and_clears(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    pageferry.restore(f"{url}/base").load()
    assert main(["cache", "list"]) == 0
    assert f"{url}/base" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert "removed 1 images" in capsys.readouterr().out


def test_guest_is_not_started_if_its_image_is_missing(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["restore", "web", f"{url}/none", "--", "qemu-system-x86_64"])
    assert (code, "no image of this name" in capsys.readouterr().err) == (31, True)


@pytest.mark.parametrize("part", ["", "packs"])
@pytest.mark.parametrize("from_cache", [False, True])
def test_access_waits_while_the_directory_is_gone(url: str, tmp_path: Path, part: str, from_cache: bool) -> None:
    image = f"{url}/other"
    if from_cache:
        pageferry.restore(image, prefetch=False)
        image = pageferry.list_cache().images[0].path
        (tmp_path / "store" / part).rename(tmp_path / "away")
    reader, log = str(Path(__file__).with_name("lazy_reader.py")), tmp_path / "log"
    with log.open("wb") as stderr, Program(reader, image, '{"prefetch": false}', stderr=stderr) as program:
        program.line()
        if not from_cache:
            (tmp_path / "store" / part).rename(tmp_path / "away")
        program.say("0")
        wait_until(lambda: "the workload waits for blocks" in log.read_text(), "the warning")
        (tmp_path / "away").rename(tmp_path / "store" / part)
        assert int(program.line()) == 2


def test_locks_are_removed_with_their_entries(url: str, cache: Path) -> None:
    pageferry.restore(f"{url}/base").load()
    (cache / "locks" / "left").touch()  # by an earlier release
    pageferry.clear_cache()
    assert list((cache / "locks").iterdir()) == []
    assert words(pageferry.restore(f"{url}/base")).size
    assert len(list((cache / "locks").iterdir())) == 1


def test_restores_and_removals_at_the_same_time_do_not_fail(url: str) -> None:
    program = f"import pageferry\nfor _ in range(10): pageferry.restore({url + '/base'!r}).load()"
    with (
        subprocess.Popen([sys.executable, "-c", program]) as one,
        subprocess.Popen([sys.executable, "-c", program]) as two,
    ):
        while one.poll() is None or two.poll() is None:
            pageferry.clear_cache()
    assert (one.returncode, two.returncode) == (0, 0)
