"""One microVM whose memory is loaded from an image: its pager, from the handshake to the end of Firecracker."""

from __future__ import annotations

import asyncio
import os
import time
from logging import getLogger

from pageferry._engine import Failure, MappedSegment, Pager, PrivateRegion, Space
from pageferry.errors import RestoreError, WorkloadDied
from pageferry.events import Latency, Listener
from pageferry.host.blocking import in_thread, to_the_end
from pageferry.images.image import ImageFile
from pageferry.images.working_set import WorkingSet
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import records
from pageferry.pager.fill_order import fill_order
from pageferry.pager.firecracker.events import End, MicrovmConnected, MicrovmEnded, MicrovmFailed
from pageferry.pager.firecracker.handshake import Handshake, InvalidHandshake
from pageferry.pager.firecracker.options import ServeOptions
from pageferry.pager.firecracker.peer import Peer

log = getLogger(__name__)

_POLL = 0.05
"""Interval of checks for failures and for the end of loading, seconds."""


class Microvm:
    """Served microVM. The constructor starts its pager; it raises InvalidHandshake if the memory does not match the
    image, RestoreError if the address space of Firecracker cannot be opened, WorkloadDied if Firecracker has exited,
    OSError."""

    def __init__(self, image: ImageFile, handshake: Handshake, peer: Peer, options: ServeOptions) -> None:
        self.peer = peer
        self.failed: str | None = None
        """Reason why the microVM was killed or stopped; None if it was not."""
        self.loaded = False
        """Whether all memory was loaded."""
        self._image = image
        self._options = options
        self._layout = handshake.layout
        self._begin = time.monotonic()
        self._check_length()
        self._pager = self._start(handshake.userfault)

    def _check_length(self) -> None:
        ours, theirs = self._image.pages * SMALL_PAGE, self._layout.length
        if ours != theirs:
            raise InvalidHandshake(
                f"the microVM has {theirs} bytes of memory, the image {ours}; use the state file of the snapshot from "
                "which the image was imported"
            )
        if theirs % self._layout.page_size:
            raise InvalidHandshake(f"the image has {theirs} bytes, which is not a multiple of the page size")

    def _start(self, userfault: int) -> Pager:
        space = self._space()
        segments = [
            MappedSegment(space, one.base_host_virt_addr, one.size, first_page=one.offset // SMALL_PAGE)
            for one in self._layout.mappings
        ]
        flags = records.create_flags(None, Pager.flags_length(self._image.pages))
        try:
            region = PrivateRegion(self._image.pages, self._layout.page_size)
            userfaults, ahead = {self.peer.pid: userfault}, self._options.prefetch
            return Pager(self._image.chain, [region], segments, userfaults, flags, fill="none", read_ahead=ahead)
        finally:
            os.close(flags)

    def _space(self) -> Space:
        pid = self.peer.pid
        try:
            return Space(pid)
        except ProcessLookupError as error:
            raise WorkloadDied(f"process {pid} exited after it had connected") from error
        except OSError as error:
            raise RestoreError(
                f"cannot open the address space of process {pid}: {error.strerror}; run the pager as root or as the "
                "user of Firecracker"
            ) from error

    async def serve(self, listener: Listener) -> None:
        """Serve until all memory is loaded, or Firecracker has exited. On cancellation, kill or stop Firecracker unless
        all memory is loaded, because it would wait for its memory for ever."""
        end: End = "frozen"
        try:
            listener(
                MicrovmConnected(
                    microvm=self.peer.pid,
                    page_size=self._layout.page_size,
                    deferred=self._pager.pending * SMALL_PAGE,
                    mappings=len(self._layout.mappings),
                )
            )
            if self._options.prefetch:
                order = fill_order(self._image, WorkingSet(self._image).windows)
                self._pager.fill(order.windows, order.blocks, self._options.eager)
            end = await self._until_end(listener)
        except BaseException as error:
            if self._pager.finished:
                end, self.loaded = "loaded", True
            else:
                cancelled = isinstance(error, asyncio.CancelledError)
                await to_the_end(self._stop("the pager was stopped" if cancelled else str(error), listener))
                end = "killed" if self._killed else "frozen"
            raise
        finally:
            await to_the_end(self._close(end, listener))

    async def _until_end(self, listener: Listener) -> End:
        ended = asyncio.ensure_future(self.peer.wait_for_end())
        reported: set[tuple[int, int, bool]] = set()
        try:
            while not self._pager.finished:
                for failure in self._pager.failures:
                    key = (failure.region, failure.page, failure.accessed)
                    if key not in reported:
                        reported.add(key)
                        await self._report(failure, listener)
                await asyncio.wait({ended}, timeout=_POLL)
                if ended.done():
                    return "killed" if self._killed else "exited"
            self.loaded = True
            return "loaded"
        finally:
            ended.cancel()

    @property
    def _killed(self) -> bool:
        return self.failed is not None and self._options.on_failure == "kill"

    async def _report(self, failure: Failure, listener: Listener) -> None:
        """Report a page that cannot be loaded. Kill or stop Firecracker if the microVM has accessed it."""
        reason = self._describe(failure)
        if failure.accessed and self.failed is None:
            await self._stop(reason, listener)
        else:
            log.error("microVM %d: %s", self.peer.pid, reason)
            listener(MicrovmFailed(microvm=self.peer.pid, reason=reason, action="none"))

    def _describe(self, failure: Failure) -> str:
        if failure.region:  # an address outside the memory
            return failure.message
        where = f"page {failure.page} (at byte {failure.page * SMALL_PAGE} of the memory)"
        return f"{where} cannot be read from {self._image.path}: {failure.message}"

    async def _stop(self, reason: str, listener: Listener) -> None:
        action = self._options.on_failure
        self.failed = reason
        log.error("microVM %d: %s; action: %s", self.peer.pid, reason, action)
        failed = await self.peer.stop(action)  # before the listener, which may raise an error
        if failed is not None:
            log.error("microVM %d: %s", self.peer.pid, failed)
        listener(MicrovmFailed(microvm=self.peer.pid, reason=reason, action=action))

    async def _close(self, end: End, listener: Listener) -> None:
        """Stop the pager, and report the end."""
        pager, counters = self._pager, self._pager.counters
        if end == "loaded" or (end == "exited" and not self._options.prefetch):
            WorkingSet(self._image).learn(pager.touched, self._options.prefetch)
        ended = MicrovmEnded(
            microvm=self.peer.pid,
            end=end,
            deferred=pager.pending * SMALL_PAGE,
            faults=counters.faults,
            missed=counters.missed,
            prefetched=counters.prefetched,
            bytes_read=counters.bytes_read,
            duration_ms=(time.monotonic() - self._begin) * 1e3,
            service_times=Latency.of(pager.histogram, counters.longest * 1e6),
        )
        gone = self.peer.exited()
        await in_thread(pager.abandon if gone else pager.stop)
        self.peer.close()
        listener(ended)
