"""Files that back memory: with base pages, with huge pages of tmpfs, or with pages of hugetlbfs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pageferry._engine import LARGE_PAGE, large_tmpfs

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
_MFD_HUGE_2MB = 21 << 26
KINDS = ("small", "large", "hugetlb")


@contextmanager
def backing(kind: str, length: int, files: int = 1) -> Iterator[list[int]]:
    """Yield descriptors of `files` new files of `length` bytes each. Skip the test if the kind is unavailable."""
    opened = []
    with _pool(files * length // LARGE_PAGE if kind == "hugetlb" else 0):
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


@contextmanager
def _pool(pages: int) -> Iterator[None]:
    """Reserve `pages` additional hugetlb pages, and restore the pool size after the block. Skip the test on failure."""
    if not pages:
        yield
        return
    if not os.access(_POOL, os.W_OK):
        pytest.skip("only root can enlarge the hugetlb pool")
    before = _POOL.read_text()
    try:
        _POOL.write_text(str(int(before) + pages))
        if int(_POOL.read_text()) < int(before) + pages:
            pytest.skip("not enough contiguous memory for hugetlb pages")
        yield
    finally:
        _POOL.write_text(before)
