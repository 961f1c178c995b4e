"""What is still to come to a workload's memory (S8), for a scan: the flags of its pager, the page map of its image."""

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
from pageferry.workloads.protocols import Workload


@dataclass(frozen=True, slots=True)
class DeferredPages:
    """Contents that memory does not hold yet."""

    flags: PagerFlags
    """With the image, where that tells what they are."""
    known: bool
    """Whether it does; they are left out otherwise."""
    first_pages: Sequence[int]
    """Number of the first page of each region, over all regions."""
    large: Sequence[Sequence[bool]]
    """Of each region, the 2 MiB units that will stand on large pages."""


def look(workload: Workload) -> DeferredPages | None:
    """What is still to come; None where everything is there. Nothing is loaded for it.

    Raises RestoreError where its pager has failed or another image has taken the place of the image, ImageError when
    the image cannot be opened.
    """
    folder = folder_of(workload)
    found = client.deferred_bits(folder) if folder is not None else None
    if found is None:
        return None
    descriptor, source = found
    try:
        lengths = [region.length // SMALL_PAGE for region in workload.regions]
        if os.fstat(descriptor).st_size != Pager.flags_length(sum(lengths)):
            return None  # it is just being made: nothing has run on it yet
        image = targets.open_expected(*source, workload.name) if source is not None else None
        return DeferredPages(
            flags=PagerFlags(descriptor, sum(lengths), image.image if image is not None else None),
            known=image is not None,
            first_pages=list(itertools.accumulate(lengths, initial=0))[:-1],
            large=targets.large_units(image) if image is not None else [[] for _ in lengths],
        )
    finally:
        os.close(descriptor)
