"""Images given by URLs: copies between stores, and operations on images in stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.errors import ImageError, UsageError
from tests.kernel.conftest import URL
from tests.stores.fault_proxy import FaultProxy

SIZE = 8 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory of the cache."""
    monkeypatch.setenv("PAGEFERRY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Return the URL of a store with the images `base` and `child`. The files are in the directory `images`."""
    arena, folder, store = pageferry.Arena(SIZE), tmp_path / "images", f"file://{tmp_path}/store"
    folder.mkdir()
    words(arena)[:] = np.random.default_rng(1).integers(0, 1 << 63, SIZE // 8, dtype="u8")
    pageferry.checkpoint(arena, folder / "base", track=True)
    words(arena)[0] = 1
    pageferry.checkpoint(arena, folder / "child", parent=folder / "base")
    for name in ("base", "child"):
        pageferry.push_image(folder / name, f"{store}/")
    return store


def words(arena: Any) -> Any:
    return np.frombuffer(memoryview(arena), "u8")


def test_copy_contains_the_same_files(url: str, proxy: FaultProxy, tmp_path: Path) -> None:
    copied = pageferry.copy_image(f"{url}/child", f"{URL}/")
    assert isinstance(copied, pageferry.ImagePushed)
    assert (copied.url, copied.parents) == (f"{URL}/child", 1)
    pageferry.pull_image(f"{URL}/child", tmp_path / "child")
    for name in ("base", "child"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "images" / name).read_bytes()


def test_copy_reads_and_uploads_only_missing_blocks(url: str, proxy: FaultProxy, tmp_path: Path) -> None:
    pageferry.push_image(tmp_path / "images" / "base", f"{URL}/other")
    proxy.requests.clear()
    copied = pageferry.copy_image(f"{url}/child", f"{URL}/copy")
    assert isinstance(copied, pageferry.ImagePushed)
    assert (copied.parents, copied.uploaded_blocks) == (0, 1)
    back = f"file://{tmp_path}/back"
    proxy.requests.clear()
    pageferry.copy_image(f"{URL}/copy", f"{back}/")
    again = pageferry.copy_image(f"{URL}/copy", f"{back}/")
    assert isinstance(again, pageferry.ImagePushed)
    assert again.existed
    proxy.requests.clear()
    pageferry.copy_image(f"{URL}/copy", f"{back}/second")
    assert not [request for request in proxy.requests if "/packs/" in request]


def test_damaged_source_is_not_copied(url: str, tmp_path: Path) -> None:
    for pack in (tmp_path / "store" / "packs").iterdir():
        with open(pack, "r+b") as file:
            file.seek(1000)
            file.write(b"damage")
    with pytest.raises(ImageError, match="cannot copy file://"):
        pageferry.copy_image(f"{url}/base", f"file://{tmp_path}/back/")
    assert pageferry.list_images(f"file://{tmp_path}/back").images == []


def test_copy_between_a_file_and_a_store_is_a_push_or_a_pull(url: str, tmp_path: Path) -> None:
    pageferry.copy_image(f"{url}/base", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "images" / "base").read_bytes()
    pageferry.copy_image(tmp_path / "copy", f"file://{tmp_path}/back/")
    assert [image.name for image in pageferry.list_images(f"file://{tmp_path}/back").images] == ["copy"]
    with pytest.raises(UsageError, match="copy files with cp"):
        pageferry.copy_image(tmp_path / "copy", tmp_path / "other")


def test_images_in_stores_are_inspected(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child, file = f"{url}/child", str(tmp_path / "images" / "child")
    info = pageferry.image_info(child)
    assert (info.path, info.id) == (child, pageferry.image_info(file).id)
    assert pageferry.verify_image(child).intact
    assert pageferry.compare_images(child, file).same
    assert pageferry.compare_images(child, f"{url}/base").pages == 1
    flat = pageferry.flatten_image(child, tmp_path / "flat")
    assert pageferry.compare_images(flat.path, child).same
    assert main(["image", "info", child]) == 0
    assert main(["image", "verify", child]) == 0
    assert main(["image", "diff", child, f"{url}/base"]) == 1
    assert main(["image", "flatten", child, str(tmp_path / "flat2")]) == 0
    assert main(["image", "copy", child, f"file://{tmp_path}/back/"]) == 0
    assert child in capsys.readouterr().out


def test_objects_and_flattened_images_are_written_to_a_store(url: str, tmp_path: Path) -> None:
    dumped = pageferry.dump({"x": np.arange(1 << 20)}, f"{url}/object")
    assert dumped.buffers == 1
    assert (pageferry.load(f"{url}/object")["x"] == np.arange(1 << 20)).all()
    with pytest.raises(ImageError, match="the store has an image of this name"):
        pageferry.dump({}, f"{url}/object")
    flat = pageferry.flatten_image(f"{url}/child", f"{url}/flat", codec="zstd")
    assert (flat.path, flat.length) == (f"{url}/flat", pageferry.image_info(f"{url}/flat").length)
    assert pageferry.image_info(f"{url}/flat").parents == []
    assert pageferry.compare_images(f"{url}/flat", tmp_path / "images" / "child").same
    assert main(["image", "flatten", f"{url}/child", f"{url}/flat2"]) == 0
