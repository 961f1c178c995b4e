"""Restores that load all contents before the workload runs, for hosts where its page faults cannot be handled (S10).

They use the pager of a lazy restore without an address space to watch. Its background thread loads everything before
the workload runs, so no access and no system call reaches a page that is not loaded.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from pageferry._engine import Pager
from pageferry.checkpoints.events import EagerEvent, ProgressEvent
from pageferry.errors import ImageError
from pageferry.events import Listener
from pageferry.host.blocking import in_thread
from pageferry.images.image import ImageFile
from pageferry.images.targets import PagerTarget
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import records

_POLL = 0.2
"""Interval of progress events, seconds."""


def load(image: ImageFile, targets: Sequence[PagerTarget], reason: str, listener: Listener) -> Pager:
    """Load all contents of an image into files that no workload runs on yet; return the pager, which has finished.

    `reason`: why contents are not loaded on demand. Raises ImageError for a page that cannot be read.
    """
    with _loading(image, targets, reason, listener) as pager:
        while not pager.wait(_POLL):
            _report(image, pager, listener)
        _report(image, pager, listener)
        return pager


async def load_guest(image: ImageFile, targets: Sequence[PagerTarget], reason: str, listener: Listener) -> Pager:
    """Load as `load` does, from a coroutine. A cancellation stops it."""
    with _loading(image, targets, reason, listener) as pager:
        while not await in_thread(pager.wait, _POLL):
            _report(image, pager, listener)
        _report(image, pager, listener)
        return pager


@contextlib.contextmanager
def _loading(image: ImageFile, targets: Sequence[PagerTarget], reason: str, listener: Listener) -> Iterator[Pager]:
    listener(EagerEvent(image=str(image.path), length=image.pages * SMALL_PAGE, reason=reason))
    flags = records.create_flags(None, Pager.flags_length(image.pages))
    try:
        pager = Pager(image.chain, targets, [], {}, flags, fill="eager")
    finally:
        os.close(flags)
    try:
        yield pager
    finally:
        pager.stop()


def _report(image: ImageFile, pager: Pager, listener: Listener) -> None:
    """Emit the progress. Raises ImageError for the first page that cannot be read."""
    for _, page, _, message in pager.failures:
        raise ImageError(f"cannot read page {page} (byte {page * SMALL_PAGE}) of {image.path}: {message}")
    _, _, _, prefetched, bytes_read, _, _ = pager.counters
    listener(
        ProgressEvent(
            deferred=pager.pending * SMALL_PAGE,
            faults=0,
            missed=0,
            prefetched=prefetched,
            bytes_read=bytes_read,
            failures=[],
        )
    )
