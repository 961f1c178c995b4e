"""The pool of hugetlb pages of this machine, which tests change one after the other."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
"""Number of hugetlb pages of 2 MiB."""


@contextmanager
def reserved(pages: int) -> Iterator[None]:
    """Add pages to the pool for the block, in which other tests cannot change it. Skip the test if this is not
    possible."""
    if not os.access(POOL, os.W_OK):
        pytest.skip("only root can enlarge the hugetlb pool")
    with POOL.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = int(POOL.read_text())
        try:
            POOL.write_text(str(before + pages))
            if int(POOL.read_text()) < before + pages:
                pytest.skip(f"the kernel cannot allocate {pages} hugetlb pages")
            yield
        finally:
            POOL.write_text(str(before))
