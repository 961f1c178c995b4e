"""Workloads that are saved, and what an image holds, against what they know about the instant that was saved."""

from __future__ import annotations

import asyncio
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
from pageferry.images.image import ImageFile
from pageferry.memory.regions import Region
from pageferry.workloads.ledger import LedgerOptions, LedgerWorkload
from pageferry.workloads.protocols import Workload

SLICE = 8192
"""Pages read at once."""
HEAVY = LedgerOptions(threads=3, zero_fraction=0.2, compressible=0.4)
"""A writer that never rests, and pages of all kinds."""


@contextmanager
def ledger(size: int = 32 << 20, options: LedgerOptions = HEAVY, **more: Any) -> Iterator[LedgerWorkload]:
    """A ledger of this process that runs; at the end nothing may be wrong with it."""
    workload = LedgerWorkload.create(size, options, exact=True, **more)
    try:
        yield workload
    finally:
        workload.stop()
    assert workload.verify().intact


def save(workload: Any, path: Path, **options: Any) -> CheckpointResult:
    """A checkpoint of it."""
    return asyncio.run(pageferry.checkpoint(workload, path, **options))


def memory_of(image: ImageFile) -> _engine.Mapping:
    """The memory of an image with one region, as a fresh mapping; what is absent stays a hole."""
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
    """The image of a ledger holds exactly the memory of the instant of its state."""
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
    """A digest of every stretch of `SLICE` pages."""
    starts = range(0, image.pages, SLICE)
    return [_digest(image.read(first, min(SLICE, image.pages - first))) for first in starts]


def digests_of_memory(regions: tuple[Region, ...]) -> list[bytes]:
    """The same of the memory itself, holes read as the zeros that they are."""
    (region,) = regions
    size = SLICE * 4096
    starts = range(0, region.length, size)
    # Through the file, not through a mapping: holes stay holes.
    return [_digest(os.pread(region.fd, min(size, region.length - at), region.file_offset + at)) for at in starts]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class Witness:
    """A workload, of which the memory is looked at in the moment that is saved."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.digests: list[bytes] = []

    def __getattr__(self, name: str) -> object:
        value: object = getattr(self._workload, name)
        return value

    async def save_state(self) -> bytes:
        state = await self._workload.save_state()
        self.digests = digests_of_memory(self._workload.regions)
        return state
