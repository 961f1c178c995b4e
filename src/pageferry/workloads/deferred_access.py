"""Access to the pager of a workload, for write traces of memory whose contents are deferred (S8).

A migration or a checkpoint installs write traces. Memory can be registered with only one userfaultfd at a time. During
a restore this is the userfaultfd of the pager, without which deferred pages would read as zeros. The pager therefore
lends its userfaultfd. While it is acquired, the pager keeps running and loads the pages that are requested. The pager
removes the traces when it is released, or when the process that acquired it exits. If the pager itself exits, requests
fail, and the pager that takes over removes the traces.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Protocol

from pageferry._engine import Pager, Space
from pageferry.errors import ImageError, RestoreError, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Readable
from pageferry.pager import client, records
from pageferry.pager.client import Connection
from pageferry.pager.protocol import HoldGiven, PagerRequest, PagerStatus
from pageferry.pager.records import Deferred
from pageferry.workloads import persistent_trace
from pageferry.workloads.folders import folder_of
from pageferry.workloads.protocols import Live


class AcquiredPager(Protocol):
    """Acquired pager. Its methods can block for a long time: do not call them from the event loop."""

    userfaults: dict[int, int]
    """Descriptors, in this process, of the userfaultfds with which the memory is registered, by process id of the
    workload's processes."""
    large: list[list[bool]]
    """Whether each 2 MiB unit of each region will be backed by a huge page once its contents are loaded."""

    def ensure(self, region: int, first: int, count: int) -> None:
        """Load `count` pages of a region from page `first` on, and return when they are present. Raises RestoreError,
        ImageError."""

    def cancel(self) -> None:
        """Interrupt an `ensure` in another thread. Later requests fail."""

    def release(self) -> None:
        """Release the pager, and remove the traces. May be called twice."""


async def acquire_uffd(workload: Live) -> AcquiredPager | None:
    """Acquire the pager of a workload. Return None if no contents are deferred any longer, and no userfaultfd covers
    the workload.

    A pager of a cold store cannot be acquired, nor can any other pager if the kernel lacks asynchronous write
    protection. In these cases, wait until the pager has loaded all contents, and return None.

    Raises RestoreError if the pager has exited, ImageError if contents cannot be read, WorkloadError if another process
    has acquired the pager.
    """
    found = await in_thread(_held, workload)
    if found is None:
        await wait_complete(workload, traces=False)
    return found


def large_units(memory: Readable, hold: AcquiredPager | None) -> list[list[bool]]:
    """Return whether each 2 MiB unit of each region is backed by a huge page, or will be when the pager has loaded the
    unit."""
    units = memory.large_units()
    if hold is None:
        return units
    return [
        [now or later for now, later in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(units, hold.large, strict=True)
    ]


def _held(workload: Live) -> AcquiredPager | None:
    if workload.pager is not None:
        return _held_here(workload.name, workload.pager)
    folder = folder_of(workload)
    if folder is None or not records.is_restoring(folder):
        return None
    record = folder.load(records.RECORD, Deferred)
    if record is not None and record.cold is not None:
        return None
    line = client.connect(folder)
    try:
        given = line.ask(PagerRequest(what="hold"), HoldGiven)
        if given.busy:
            raise _busy(folder.name)
        if given.userfaults is None:
            line.close()
            return None
        return _PagerElsewhere(line, given)
    except BaseException:
        line.close()
        raise


def _held_here(name: str, pager: Pager) -> AcquiredPager | None:
    try:
        userfaults = pager.hold()
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _busy(name) from error
        return None
    return None if userfaults is None else _PagerHere(pager, userfaults)


def _busy(name: str) -> WorkloadError:
    return WorkloadError(
        f"cannot acquire the pager of {name}: another migration or checkpoint is using it; retry when that has finished"
    )


class _PagerHere:
    """Pager of this process."""

    def __init__(self, pager: Pager, userfaults: dict[int, int]) -> None:
        self.userfaults = userfaults
        self.large = [pager.large(0)]
        self._pager = pager

    def ensure(self, region: int, first: int, count: int) -> None:
        """See `AcquiredPager`."""
        assert region == 0, "an arena has one region"
        load_pages(self._pager, first, count)

    def cancel(self) -> None:
        """Do nothing: the image of an arena is a local file."""

    def release(self) -> None:
        """See `AcquiredPager`."""
        self._pager.release()


class _PagerElsewhere:
    """Pager that is reached over a socket. It is released when either side closes the connection."""

    def __init__(self, line: Connection, given: HoldGiven) -> None:
        assert given.userfaults is not None
        self.userfaults: dict[int, int] = {}
        self.large = [[bool(unit) for unit in units] for units in given.large]
        self._line = line
        space = Space(given.pager)
        try:
            for pid, number in given.userfaults.items():
                self.userfaults[pid] = space.descriptor(number)
        except OSError as gone:
            self._close()
            raise client.gone(line.folder, gone) from gone

    def ensure(self, region: int, first: int, count: int) -> None:
        """See `AcquiredPager`."""
        self._line.ask(PagerRequest(what="ensure", region=region, first=first, count=count), PagerStatus)

    def cancel(self) -> None:
        """See `AcquiredPager`."""
        self._line.cut()

    def release(self) -> None:
        """See `AcquiredPager`."""
        with contextlib.suppress(RestoreError, ImageError):  # the pager has exited, with its workload
            self._line.ask(PagerRequest(what="release"), PagerStatus)
        self._close()

    def _close(self) -> None:
        while self.userfaults:
            os.close(self.userfaults.popitem()[1])
        self._line.close()


async def wait_complete(workload: Live, *, traces: bool = True) -> None:
    """Complete a restore of the workload: load all contents, and unregister its memory from userfaultfd.

    `traces`: whether to remove the write trace of the last checkpoint too.

    Raises RestoreError if its pager has exited, ImageError if the image cannot be read.
    """
    if workload.pager is not None:
        pager, length = workload.pager, workload.regions[0].length
        await in_thread(load_all, pager, length)
    else:
        folder = folder_of(workload)
        if folder is not None and records.is_restoring(folder):
            await in_thread(client.wait_complete, folder)
    if traces:
        await in_thread(persistent_trace.forget, workload)


def load_pages(pager: Pager, first: int, count: int, origin: str = "") -> None:
    """Load `count` pages from page `first` on, with a pager of this process. `origin`: source of the contents, for
    error messages.

    Raises ImageError for a damaged page, RestoreError if the pager has stopped.
    """
    told = f"{origin}: " if origin else ""
    try:
        pager.ensure(0, first, count)
    except ValueError as error:
        raise ImageError(f"{told}{error}") from error
    except OSError as error:
        raise RestoreError(f"{told}{error}") from error


def load_all(pager: Pager, length: int, origin: str = "") -> None:
    """Load all `length` bytes, and wait until the memory is unregistered from userfaultfd. Raises the same errors as
    `load_pages`."""
    while not pager.finished:
        load_pages(pager, 0, length // SMALL_PAGE, origin)
        pager.wait(1.0)
