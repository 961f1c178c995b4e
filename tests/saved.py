"""Workloads to checkpoint, and checks of an image against the workload's state at the snapshot point."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pageferry
from pageferry import _engine
from pageferry.checkpoints.events import CheckpointResult
from pageferry.demo.ledger import LedgerOptions, LedgerWorkload
from pageferry.images.image import ImageFile
from pageferry.memory.regions import Region
from pageferry.workloads.protocols import Migratable

SLICE = 8192
"""Number of pages read at once."""
HEAVY = LedgerOptions(threads=3, zero_fraction=0.2, compressible=0.4)
"""Options of a ledger with an unlimited write rate and pages of all classes."""


@contextmanager
def ledger(size: int = 32 << 20, options: LedgerOptions = HEAVY, **more: Any) -> Iterator[LedgerWorkload]:
    """Run a ledger in this process. After the block, stop the ledger and check that it is intact."""
    workload = LedgerWorkload.create(size, options, exact=True, **more)
    try:
        yield workload
    finally:
        workload.stop()
    assert workload.verify().intact


def save(workload: Any, path: Path, **options: Any) -> CheckpointResult:
    """Save a checkpoint of the workload."""
    return pageferry.checkpoint(workload, path, **options)


def memory_of(image: ImageFile) -> _engine.Mapping:
    """Return a new mapping with the memory of an image that has one region. Slices of zeros remain holes."""
    length = image.pages * 4096
    file = os.memfd_create("image")
    try:
        os.ftruncate(file, length)
        mapping = _engine.Mapping(file, length)
    finally:
        os.close(file)
    view = memoryview(mapping)
    zeros = bytes(SLICE * 4096)
    for first in range(0, image.pages, SLICE):
        data = image.read(first, min(SLICE, image.pages - first))
        if data != zeros[: len(data)]:
            view[first * 4096 : first * 4096 + len(data)] = data
    return mapping


def check_ledger(path: Path) -> ImageFile:
    """Check that the image of a ledger contains exactly the memory of the snapshot point. Return the opened image."""
    image = ImageFile(path)
    state = json.loads(image.state())
    ledger = _engine.Ledger.attach(memory_of(image), threads=0)
    assert ledger.writes() == state["writes"]
    assert ledger.fingerprint() == state["fingerprint"]
    if state["digest"] is not None:
        assert ledger.digest() == state["digest"]
    assert ledger.verify().intact
    assert image.verify() == []
    return image


def digests_of_image(image: ImageFile) -> list[bytes]:
    """Return a digest of each slice of `SLICE` pages of an image's memory."""
    starts = range(0, image.pages, SLICE)
    return [_digest(image.read(first, min(SLICE, image.pages - first))) for first in starts]


def digests_of_memory(regions: tuple[Region, ...]) -> list[bytes]:
    """Return a digest of each slice of `SLICE` pages of a workload's single region. Holes are read as zeros."""
    (region,) = regions
    size = SLICE * 4096
    starts = range(0, region.length, size)
    # pread(2) keeps holes in the file. A read through a mapping would allocate pages.
    return [_digest(os.pread(region.fd, min(size, region.length - at), region.file_offset + at)) for at in starts]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class DigestedWorkload:
    """Proxy of a workload that records digests of its memory at the snapshot point."""

    def __init__(self, workload: Migratable) -> None:
        self._workload = workload
        self.digests: list[bytes] = []

    def __getattr__(self, name: str) -> object:
        value: object = getattr(self._workload, name)
        return value

    async def save_state(self) -> bytes:
        state = await self._workload.save_state()
        self.digests = digests_of_memory(self._workload.regions)
        return state
