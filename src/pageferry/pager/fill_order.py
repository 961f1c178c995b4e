"""Order in which a pager loads deferred contents in the background (S10).

1. The working set, in the order in which earlier restores accessed it: the workload is likely to access the same pages
   in the same order.
2. All storage blocks in the order of the file, so that the disk reads sequentially: first those of the image, then
   those of its parents. Each block is read and decompressed once.
3. All other pages, namely patterns and duplicates. The pager needs no order for them.

Faults have precedence: the pager pauses background loading while there are faults, unless loading is eager.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pageferry.images.image import ImageFile


class FillOrder(NamedTuple):
    """Order of background loading."""

    windows: Sequence[int]
    """Windows of 16 pages, numbered over all regions."""
    blocks: Sequence[tuple[int, int]]
    """Storage blocks, each as (index of the image in its chain, index of the block); index 0 is the image itself."""


def fill_order(image: ImageFile, working_set: Sequence[int]) -> FillOrder:
    """Return the order in which to load an image. `working_set`: windows of 16 pages."""
    blocks = [(number, block) for number, link in enumerate(image.links) for block in range(link.image.block_count)]
    return FillOrder(working_set, blocks)
