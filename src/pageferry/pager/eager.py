"""Loading of all contents before the workload runs, for hosts where its page faults cannot be handled (S10).

`load` uses the pager of a lazy restore, without an address space to watch. The background thread of the pager loads all
contents before the workload runs, so that no access and no system call reaches a page that is not loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from pageferry._engine import Pager, TargetRegion
from pageferry.errors import ImageError
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import records
from pageferry.pager.fill_order import fill_order

_POLL = 0.2
"""Interval of reports, seconds."""

Report = Callable[[int, int, int], None]
"""Function that is called with the deferred memory in bytes, the number of pages loaded, and the number of bytes
read."""


def load(image: ImageFile, targets: Sequence[TargetRegion], report: Report) -> Pager:
    """Load all contents of an image into the memory of a workload that is not running yet. Return the pager, which has
    finished.

    Raises ImageError for a page that cannot be read.
    """
    flags = records.create_flags(None, Pager.flags_length(image.pages))
    try:
        blocks = fill_order(image, ()).blocks
        pager = Pager(image.chain, targets, [], {}, flags, fill="eager", blocks=blocks)
    finally:
        os.close(flags)
    try:
        finished = False
        while not finished:
            finished = pager.wait(_POLL)
            for failure in pager.failures:
                where = f"page {failure.page} (byte {failure.page * SMALL_PAGE})"
                raise ImageError(f"cannot read {where} of {image.path}: {failure.message}")
            counters = pager.counters
            report(pager.pending * SMALL_PAGE, counters.prefetched, counters.bytes_read)
        return pager
    finally:
        pager.stop()
