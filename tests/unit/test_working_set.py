"""Tests of working sets: a restore records the windows that are accessed, for later restores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from pageferry.images.image import ImageFile
from pageferry.images.working_set import WorkingSet


def image(path: Path, identity: bytes = b"one") -> ImageFile:
    """Return a substitute for an image, with 1,600 pages in 100 windows."""
    return cast(ImageFile, SimpleNamespace(path=path, image=SimpleNamespace(id=identity), pages=1600))


def learnt(path: Path, *runs: tuple[list[int], bool]) -> list[int]:
    """Return the windows recorded after `runs`. Each run uses a new object, as a separate process does."""
    for touched, prefetched in runs:
        WorkingSet(image(path)).learn(touched, prefetched)
    return WorkingSet(image(path)).windows


def test_first_run_is_the_record(tmp_path: Path) -> None:
    assert learnt(tmp_path / "image", ([5, 3, 5, 9], True)) == [5, 3, 9]


def test_runs_without_prefetch_are_intersected(tmp_path: Path) -> None:
    assert learnt(tmp_path / "image", ([5, 3, 9], False), ([9, 5, 1], False)) == [5, 9]


def test_window_missed_by_prefetch_twice_is_added(tmp_path: Path) -> None:
    path = tmp_path / "image"
    assert learnt(path, ([5, 3], True), ([7, 8], True)) == [5, 3]
    assert learnt(path, ([8, 6], True)) == [5, 3, 8]


def test_record_of_another_image_is_ignored(tmp_path: Path) -> None:
    learnt(tmp_path / "image", ([5, 3], True))
    assert WorkingSet(image(tmp_path / "image", b"two")).windows == []


def test_damaged_record_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "image"
    learnt(path, ([5, 3, 1000000], True))
    assert WorkingSet(image(path)).windows == [5, 3]
    (tmp_path / "image.ws").write_bytes(b"\xff\x00rubbish")
    assert WorkingSet(image(path)).windows == []


def test_unwritable_record_is_not_an_error(tmp_path: Path) -> None:
    WorkingSet(image(tmp_path / "none" / "image")).learn([1], True)
