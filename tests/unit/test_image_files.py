"""Tests of image files: atomic replacement, and removal of files of crashed writers, with and without O_TMPFILE."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from pageferry.images.image import new_file as new_file

NAMES = ["unnamed", "hidden"]


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a directory. For the parameter `hidden`, O_TMPFILE fails there, as on some file systems, such as NFS."""
    if request.param == "hidden":
        really = os.open

        def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            return really(path, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refusing)
    return tmp_path


def test_file_appears_when_complete(folder: Path) -> None:
    path = folder / "image"
    for contents in (b"first", b"second"):
        with new_file(path) as descriptor:
            os.write(descriptor, contents)
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == contents
    assert os.listdir(folder) == ["image"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_failed_file_does_not_appear(folder: Path) -> None:
    def fail() -> None:
        with new_file(folder / "image"):
            raise RuntimeError("the writer has failed")

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(folder) == []


def test_leftovers_of_crashed_writers_are_removed(folder: Path) -> None:
    (folder / ".image.01234567").touch()
    for other in (".image.0123456", ".image.0123456789", ".other.01234567", "image.01234567", ".imagex01234567"):
        (folder / other).touch()
    with new_file(folder / "image"):
        assert not (folder / ".image.01234567").exists()
    assert len(os.listdir(folder)) == 6


def test_file_of_a_running_writer_is_kept(folder: Path) -> None:
    with open(folder / ".image.01234567", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with new_file(folder / "image"):
            pass
        assert sorted(os.listdir(folder)) == [".image.01234567", "image"]


def test_concurrent_writers_replace_each_other(folder: Path) -> None:
    with new_file(folder / "image") as first:
        with new_file(folder / "image") as second:
            os.write(second, b"second")
        os.write(first, b"first")
    assert (folder / "image").read_bytes() == b"first"
    assert os.listdir(folder) == ["image"]
