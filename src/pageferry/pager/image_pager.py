"""Pager of a workload whose contents are in an image: a guest that is being restored, or a workload with a cold store.

The record and the deferred bitmap in the directory of the workload, and the userfaultfds that its processes keep, allow
another pager to take over at any time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from pageferry._engine import Advice, Pager
from pageferry.errors import ImageError
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder
from pageferry.images import targets
from pageferry.images.image import ImageFile, open_link
from pageferry.images.working_set import WorkingSet
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE, Segment
from pageferry.memory.view import mapped
from pageferry.pager import records
from pageferry.pager.fill_order import fill_order
from pageferry.pager.records import Deferred, OwnImage
from pageferry.pager.service import PagerService

if TYPE_CHECKING:
    from pageferry.pager.alarm import PauseRequest

log = logging.getLogger("pageferry.pager")

_POLL = 0.05
"""Interval of checks whether the workload still runs, seconds."""
_SELDOM = 0.5
"""Interval of the same checks by the pager of a cold store, which rarely has work, seconds."""
_MOST_KEPT = 1 << 17
"""Maximum number of touched windows in the summary: 8 GiB of memory."""


class ImagePager:
    """Pager that loads the memory of one workload from an image: on demand and, after `fill`, also in the background.

    The constructor raises RestoreError, WorkloadError, CannotHandleFaults, and UsageError if another pager is running.
    After an error, nothing of this pager is left behind.
    """

    def __init__(
        self, image: ImageFile, folder: Folder, work: Deferred, *, taken_over: bool = False, evicting: bool = False
    ) -> None:
        self.image = image
        self.folder = folder
        self.work = work
        self.regions = [records.open_region(record) for record in work.regions]
        targets.compare(image, self.regions)
        self.working_set = WorkingSet(image)
        self.service = PagerService(self.regions, folder)
        self._filling = not work.prefetch
        self._evicting = evicting
        self._pause: PauseRequest | None = None
        try:
            if work.pausing:
                self._request_pause()
            self._start(taken_over)
            fault_point("pager.registered")
            # The record is stored only after the pager has set the bitmap: a record with an empty bitmap would mean
            # that all pages are present.
            self._store(userfaults=self.service.userfaults)
            self.service.serve(str(image.path), image.identity)
            if self._pause is not None:  # when the takeover has completed, a client of the guest may resume it
                self._pause.wait()
                self._check_pause()
        except BaseException:
            self.close()
            raise

    def _start(self, taken_over: bool) -> None:
        if taken_over:
            self.service.take_bitmap(self.folder)
            self.service.start(lambda ours, flags: self._pager(ours, flags, "taken-over"), self.work.userfaults)
        else:
            begin: Literal["empty", "kept"] = "empty" if self.work.cold is None else "kept"
            self.service.start(lambda ours, flags: self._pager(ours, flags, begin))

    def _pager(self, ours: dict[int, int], flags: int, begin: Literal["empty", "kept", "taken-over"]) -> Pager:
        return Pager(
            self.image.chain,
            targets.targets(self.image, self.regions),
            mapped(self.service.spaces, self._watched()),
            ours,
            flags,
            fill="none",
            windows=self._first_windows,
            begin=begin,
            whole_blocks=self.work.cold is None,
            read_ahead=self.work.prefetch,
            evicting=self._evicting,
            checks_removals=self.work.qmp_socket is None,
        )

    @property
    def _first_windows(self) -> list[int]:
        """Windows to load before `fill`. Those of a store are requested while the device state is being loaded; a disk
        serves the faults of that time alone."""
        return self.working_set.windows if self.image.is_fetched and self.work.prefetch else []

    def _watched(self) -> Iterator[tuple[int, Segment]]:
        """Yield the segments that this pager watches, each with the index of its region: all mappings, or only those
        parts that are in the cold store."""
        for number, region in enumerate(self.regions):
            parts = [(0, region.length)] if self.work.cold is None else self.work.cold[number]
            for segment in region.segments:
                yield from ((number, part) for part in segment.within(parts))

    # -- while the workload runs

    def fill(self) -> None:
        """Start to load all contents in the background, unless the restore is without prefetch."""
        if not self._filling:
            self._filling = True
            order = fill_order(self.image, self.working_set.windows)
            self.service.pager.fill(order.windows, order.blocks, self.work.eager)

    def end_evictions(self) -> None:
        """Allow the pager to finish when all pages are loaded. Before this call, the pager of an evicting reclaim does
        not finish."""
        if self._evicting:
            self._evicting = False
            self.service.pager.evicted()

    def run(self) -> None:
        """Serve until all contents are loaded, the workload has exited, or a client requests the exit of the pager."""
        known: set[tuple[int, int, bool]] = set()
        """Failures that have been reported: region, page, whether the workload has accessed it."""
        pages = 0
        poll = _POLL if self.work.cold is None else _SELDOM
        server = self.service.server
        assert server is not None
        while not self.service.pager.wait(poll, pages):
            if self.service.ended() is not None:
                log.info("%s has ended", self.folder.name)
                self._remove_store()
                return
            if server.asked_to_stop.is_set():
                return
            failures = self.service.pager.failures
            pages = len(failures)
            for failure in failures:
                if (key := (failure.region, failure.page, failure.accessed)) not in known:
                    known.add(key)
                    self._complain(server.describe(failure), accessed=failure.accessed)
            self._check_pause()
        self._finish()

    def close(self) -> None:
        """Stop the pager, and close the files of the memory. Missing pages stay missing, so that another pager can take
        over."""
        self.service.close()
        while self.regions:
            os.close(self.regions.pop().fd)

    def _complain(self, description: str, *, accessed: bool) -> None:
        """Log a page that cannot be read, and pause a guest that waits for it."""
        log.error("%s: %s", self.folder.name, description)
        if accessed and self.work.qmp_socket is not None:
            pause = self._pause or self._request_pause()
            log.error("%s %s", self.folder.name, pause.wait())
            log.error(
                "to continue with an intact copy of the image, run: pageferry restore --takeover %s IMAGE",
                self.folder.name,
            )

    def _request_pause(self) -> PauseRequest:
        """Request a pause of the guest. The record keeps the request until QEMU has responded, for the next pager."""
        from pageferry.pager.alarm import PauseRequest

        assert self.work.qmp_socket is not None
        self._pause = pause = PauseRequest(self.work.qmp_socket)
        self._store(pausing=True)
        return pause

    def _check_pause(self) -> None:
        if self._pause is not None and not self._pause.open:
            self._pause = None
            self._store(pausing=False)

    def _store(self, **changes: object) -> None:
        """Store the record with changes. It is not synced: a guest waits for this write, and does not survive a crash
        of the host anyway."""
        self.work = msgspec.structs.replace(self.work, **changes)
        self.folder.store(records.RECORD, self.work, synced=False)

    # -- the end

    def _finish(self) -> None:
        fault_point("pager.settled")
        pager, server = self.service.pager, self.service.server
        assert server is not None
        if self.work.cold is None:
            self.working_set.learn(pager.touched, self.work.prefetch)
        else:
            self._make_large()
        status = server.status(touched=pager.touched[:_MOST_KEPT])
        self.folder.store(records.SUMMARY, status)  # stored first: a client that finds no record reads the summary
        self.service.forget(records.RECORD)
        fault_point("pager.forgotten")
        self.service.release_userfaults()
        fault_point("pager.closed")
        self._remove_store()
        log.info("%s: restore complete: %d faults, %d bytes read", self.folder.name, status.faults, status.bytes_read)

    def _make_large(self) -> None:
        """Collapse the split pages into huge pages again, where possible. Revert MADV_DONTFORK, unless the workload is
        a guest."""
        for number, segment in self._watched():
            if self.regions[number].page_size == SMALL_PAGE:
                space = self.service.spaces[segment.pid]
                for address in range(segment.address, segment.address + segment.length, LARGE_PAGE):
                    with contextlib.suppress(OSError):
                        space.collapse(address, LARGE_PAGE)
                if self.work.qmp_socket is None:
                    with contextlib.suppress(OSError):
                        space.madvise(segment.address, segment.length, Advice.DOFORK)

    def _remove_store(self) -> None:
        """Remove the images that reclaim has created, after their pages are reloaded or their workload has exited.

        Files that have replaced one of them are kept.
        """
        for own in self.work.own:
            if self._is_own(own):
                Path(own.path).unlink(missing_ok=True)

    def _is_own(self, own: OwnImage) -> bool:
        """Return whether the file at `own.path` is the image `own`: the same file as an open image, or an image of the
        same identity."""
        try:
            found = os.lstat(own.path)
            opened = [os.fstat(link.image.fileno()) for link in self.image.links if link.identity == own.identity]
            return any(os.path.samestat(found, one) for one in opened) or (
                stat.S_ISREG(found.st_mode) and open_link(Path(own.path)).identity == own.identity
            )
        except (OSError, ImageError):
            return False
