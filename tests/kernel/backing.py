"""Files that back memory: with base pages, with huge pages of tmpfs, or with pages of hugetlbfs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from pageferry._engine import LARGE_PAGE, large_tmpfs
from tests import hugetlb

_MFD_HUGE_2MB = 21 << 26
KINDS = ("small", "large", "hugetlb")


@contextmanager
def backing(kind: str, length: int, files: int = 1) -> Iterator[list[int]]:
    """Yield descriptors of `files` new files of `length` bytes each. Skip the test if the kind is unavailable."""
    opened = []
    with hugetlb.reserved(files * length // LARGE_PAGE) if kind == "hugetlb" else nullcontext():
        try:
            opened = [_open(kind, length) for _ in range(files)]
            yield opened
        finally:
            for fd in opened:
                os.close(fd)


def _open(kind: str, length: int) -> int:
    if kind == "large":
        fd = _on_tmpfs(length)
    else:
        fd = os.memfd_create("test", os.MFD_CLOEXEC | (os.MFD_HUGETLB | _MFD_HUGE_2MB if kind == "hugetlb" else 0))
    os.ftruncate(fd, length)
    return fd


def _on_tmpfs(length: int) -> int:
    try:
        directory = large_tmpfs(length + LARGE_PAGE)
    except PermissionError:
        pytest.skip("mounting a tmpfs with huge=always requires root")
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
    finally:
        os.close(directory)
