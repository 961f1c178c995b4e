"""Tests of files for guest memory, and of the error if no file can be created."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pageferry.errors import UnsupportedError
from pageferry.host import memory_file

MIB = 1 << 20


@contextmanager
def ram_file(size: int, hugetlb: bool = False) -> Iterator[memory_file.RamFile]:
    file = memory_file.create_ram_file(size, hugetlb=hugetlb)
    try:
        yield file
    finally:
        os.close(file.fd)


@pytest.mark.parametrize("size", [4096, 3 * MIB + 8192, 64 * MIB, 1 << 40])
def test_file_has_requested_size_and_is_unnamed(size: int, root: None) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    with ram_file(size) as file:
        found = os.fstat(file.fd)
        assert (found.st_size, found.st_nlink, found.st_blocks) == (size, 0, 0)
        assert not os.get_inheritable(file.fd)
        assert os.path.samestat(os.stat(file.inherited_path), found)
        assert Path("/proc/self/mountinfo").read_text() == mounts


def test_file_can_be_written_to_its_full_size(root: None) -> None:
    with ram_file(3 * MIB) as file:
        for position in range(0, 3 * MIB, MIB):
            assert os.pwrite(file.fd, b"x" * MIB, position) == MIB
        assert os.fstat(file.fd).st_blocks * 512 >= 3 * MIB


def test_first_touch_gives_a_large_page(root: None) -> None:
    if "[deny]" in Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text():
        pytest.skip("huge pages in shared memory are denied on this host")
    with ram_file(64 * MIB) as file:
        assert file.warning is None
        os.pwrite(file.fd, b"x" * 2 * MIB, 0)
        assert os.fstat(file.fd).st_blocks * 512 == 2 * MIB
        # tmpfs reports its huge page size as st_blksize.
        assert os.fstat(file.fd).st_blksize == 2 * MIB


def test_file_without_privileges_is_on_dev_shm_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(memory_file, "_file_on_own", refuse)
    with ram_file(64 * MIB) as file:
        assert file.warning is not None
        assert "huge pages are disabled" in file.warning
        assert os.fstat(file.fd).st_dev == os.stat("/dev/shm").st_dev
        assert os.fstat(file.fd).st_size == 64 * MIB
    with pytest.raises(UnsupportedError, match="do not fit on /dev/shm"):
        memory_file.create_ram_file(1 << 50)


def test_hugetlb_error_states_the_missing_pages() -> None:
    with pytest.raises(
        UnsupportedError, match=r"1048576 free pages of 2 MiB are required, \d+ are available; add \d+ to"
    ):
        memory_file.create_ram_file(2 << 40, hugetlb=True)
    with pytest.raises(UnsupportedError, match="not a multiple of 2 MiB"):
        memory_file.create_ram_file(63 * MIB, hugetlb=True)
