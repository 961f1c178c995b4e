"""Restores that load all contents before the workload runs, with their events (S10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pageferry._engine import Pager, TargetRegion
from pageferry.checkpoints.events import EagerEvent, ProgressEvent
from pageferry.events import Listener
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import eager


def load(image: ImageFile, targets: Sequence[TargetRegion], reason: str, listener: Listener) -> Pager:
    """Load all contents of an image into the memory of a workload that does not run yet. Return the pager, which has
    finished.

    `reason`: why contents are not loaded on demand. Raises ImageError for a page that cannot be read.
    """
    listener(EagerEvent(image=str(image.path), length=image.pages * SMALL_PAGE, reason=reason))
    return eager.load(image, targets, reporter(listener))


def reporter(listener: Listener) -> Callable[[int, int, int], None]:
    """Return a `pager.eager.Report` function that emits the progress as ProgressEvent."""

    def report(deferred: int, prefetched: int, bytes_read: int) -> None:
        progress = ProgressEvent(
            deferred=deferred, faults=0, missed=0, prefetched=prefetched, bytes_read=bytes_read, failures=[]
        )
        listener(progress)

    return report
