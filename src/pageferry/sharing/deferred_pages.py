"""Deferred memory of a workload (S8) for a scan: the deferred bitmap of its pager, and the page map of its image."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pageferry._engine import Pager, PagerFlags
from pageferry.images import targets
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import client
from pageferry.workloads.folders import folder_of
from pageferry.workloads.protocols import Migratable


@dataclass(frozen=True, slots=True)
class DeferredPages:
    """Deferred contents of a workload."""

    flags: PagerFlags
    """Deferred bitmap, with the image from which the contents are loaded, if there is one."""
    known: bool
    """Whether the contents are known from an image. Unknown contents are excluded from the scan."""
    first_pages: Sequence[int]
    """Index of the first page of each region, counted over all regions."""
    large: Sequence[Sequence[bool]]
    """Whether each 2 MiB unit will be backed by a huge page, for each region; empty if unknown."""


def look(workload: Migratable) -> DeferredPages | None:
    """Return the deferred contents of a workload, or None if it has none. Nothing is loaded.

    Raises RestoreError if its pager has failed or another image has replaced the image, ImageError if the image cannot
    be opened.
    """
    folder = folder_of(workload)
    found = client.deferred_bits(folder) if folder is not None else None
    if found is None:
        return None
    descriptor, source = found
    try:
        lengths = [region.length // SMALL_PAGE for region in workload.regions]
        if os.fstat(descriptor).st_size != Pager.flags_length(sum(lengths)):
            return None  # the bitmap is still being created: the workload has not run yet
        image = targets.open_expected(*source, workload.name) if source is not None else None
        return DeferredPages(
            flags=PagerFlags(descriptor, sum(lengths), image.image if image is not None else None),
            known=image is not None,
            first_pages=list(itertools.accumulate(lengths, initial=0))[:-1],
            large=targets.large_units(image) if image is not None else [[] for _ in lengths],
        )
    finally:
        os.close(descriptor)
