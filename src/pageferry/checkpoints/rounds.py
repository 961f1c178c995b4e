"""Rounds of a checkpoint that has a write trace (S4): copy written pages while the workload runs, until at most
`max_remaining` are left for the pause.

Every copy follows a collection. The collection protects the written pages before they are read, so that a later write
is reported again. The engine copies pages and keeps the sets of written pages (`Saver.collect`, `Saver.copy`), without
holding the GIL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

CHUNK = 4096
"""Number of pages that are loaded and copied at a time: 16 MiB."""
ATTEMPTS = 3
"""Maximum number of attempts, if memory is discarded during the rounds."""


class Copier(Protocol):
    """Part of `Saver` that the rounds use."""

    @property
    def pages(self) -> Literal["swept", "written", "all"]:
        """See `Saver`."""

    def collect(self) -> int:
        """See `Saver`."""

    def scan(self) -> int:
        """See `Saver`."""

    def copy(self) -> None:
        """See `Saver`."""

    def copy_range(self, region: int, first: int, count: int) -> None:
        """See `Saver`."""

    def lost(self) -> bool:
        """See `Saver`."""


def _nothing_deferred(_region: int, _first: int, _count: int) -> None:
    """Do nothing: all pages are present."""


class Rounds:
    """Rounds of one checkpoint. `max_remaining`: maximum number of pages left for the pause."""

    def __init__(self, max_remaining: int) -> None:
        self.max_remaining = max_remaining
        self.count = 0
        """Number of rounds."""
        self.seconds = 0.0
        """Duration of all rounds, seconds."""

    def run(
        self,
        saver: Copier,
        regions: Sequence[int],
        drain: Callable[[], object],
        load: Callable[[int, int, int], object] = _nothing_deferred,
    ) -> None:
        """Copy pages until at most `max_remaining` are left. Do nothing if the saver has no trace to copy from.

        `regions`: number of pages of each region; `drain`() returns when direct I/O that started before the call has
        completed; `load`(region, first page, pages) makes deferred pages present. Raises LookupError if the trace
        cannot be used: the rounds do not converge, or memory is discarded in every attempt. The call blocks: do not
        make it from the event loop.
        """
        self.count, begin = 0, time.monotonic()
        try:
            if saver.pages == "all":
                self._copy_all(saver, regions, drain, load)
            if saver.pages != "swept":
                self._copy_written(saver, drain)
        finally:
            self.seconds = time.monotonic() - begin

    def _copy_all(
        self,
        saver: Copier,
        regions: Sequence[int],
        drain: Callable[[], object],
        load: Callable[[int, int, int], object],
    ) -> None:
        """Load and copy all pages, chunk by chunk. This is the first round if there is no trace since the parent."""
        drain()  # completes I/O that pinned pages before the trace was installed
        for region, pages in enumerate(regions):
            for first in range(0, pages, CHUNK):
                count = min(CHUNK, pages - first)
                load(region, first, count)
                saver.copy_range(region, first, count)
        self.count += 1

    def _copy_written(self, saver: Copier, drain: Callable[[], object]) -> None:
        saver.collect()
        for _ in range(ATTEMPTS):
            self._converge(saver, saver.scan(), drain)
            if not saver.lost():
                return
        raise LookupError(f"cannot use the write trace: memory was discarded in each of {ATTEMPTS} attempts")

    def _converge(self, saver: Copier, remaining: int, drain: Callable[[], object]) -> None:
        while remaining > self.max_remaining:
            before = remaining
            drain()  # completes I/O that pinned pages before they were collected
            saver.copy()
            remaining = saver.collect()
            self.count += 1
            # Every round but the last must at least halve the number of pages. All rounds together then save at most
            # twice the pages of the first.
            if remaining > max(self.max_remaining, before // 2):
                raise LookupError(
                    "cannot use the write trace: rounds do not converge, because memory is written faster than saved"
                )
