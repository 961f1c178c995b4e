"""Operations on images from Python: information, verification, comparison and merging."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pageferry
from pageferry.cli.main import main
from pageferry.errors import ImageError, UsageError


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """Return the paths of an image of an arena and of an incremental image."""
    arena = pageferry.Arena(1 << 20)
    np.frombuffer(memoryview(arena), "u8")[:] = np.random.default_rng(1).integers(0, 1 << 60, 1 << 17, dtype="u8")
    old, new = tmp_path / "old", tmp_path / "new"
    pageferry.checkpoint(arena, old)
    memoryview(arena)[:3] = b"abc"
    pageferry.checkpoint(arena, new, parent=old)
    return old, new


def test_images_are_described_compared_and_merged(images: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = images
    info = pageferry.image_info(new)
    assert (info.kind, info.parents) == ("arena", [str(old)])
    assert info.regions[0].pages["parent"] == 255
    assert pageferry.verify_image(new).intact
    found = pageferry.compare_images(old, new)
    assert (found.same, found.pages, found.runs) == (False, 1, [("arena", 0, 4096)])
    flat = pageferry.flatten_image(new, tmp_path / "flat", codec="zstd")
    assert flat.length == (tmp_path / "flat").stat().st_size
    assert pageferry.image_info(tmp_path / "flat").parents == []
    assert pageferry.compare_images(new, tmp_path / "flat").same


@pytest.mark.parametrize("target", ["old", "new", "link", "hard"])
def test_merged_image_does_not_replace_an_image_of_the_chain(
    images: tuple[Path, Path], tmp_path: Path, target: str
) -> None:
    old, new = images
    (tmp_path / "link").symlink_to(old)
    (tmp_path / "hard").hardlink_to(new)
    with pytest.raises(UsageError, match="would replace an image in the chain"):
        pageferry.flatten_image(new, tmp_path / target)
    assert main(["image", "flatten", str(new), str(tmp_path / target)]) == UsageError.exit_code
    assert pageferry.verify_image(new).intact


def test_damage_is_reported_and_errors_name_a_remedy(images: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = images
    with open(old, "r+b") as file:
        file.seek(old.stat().st_size // 2)
        file.write(bytes(64))
    verified = pageferry.verify_image(new)
    assert not verified.intact
    assert verified.findings
    with pytest.raises(ImageError):
        pageferry.flatten_image(new, tmp_path / "flat")
    assert not (tmp_path / "flat").exists()
    with pytest.raises(UsageError, match="codec"):
        pageferry.flatten_image(new, tmp_path / "flat", codec="gzip")  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        pageferry.image_info(tmp_path / "nothing")
