"""The page tables of a workload whose contents are still to come, for who does not wait until they are there (S8).

A migration or a checkpoint puts write traces on, and memory has one userfaultfd at a time: that of the pager, without
which missing pages would be zeros. So the pager is *held*: traces are put on by its userfaultfd, it does not end
meanwhile, and it brings what is asked for. It takes the traces off when it is released, and when who holds it dies.
If the pager dies, whatever is asked of it fails; the next one takes the traces off.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from typing import Protocol, TypeVar

import msgspec

from pageferry._engine import Pager, Space
from pageferry.errors import ImageError, RestoreError, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.registry import Folder
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Memory
from pageferry.pager import client, records
from pageferry.pager.protocol import HoldGiven, PagerRequest, PagerStatus
from pageferry.pager.records import Deferred
from pageferry.workloads import persistent_trace
from pageferry.workloads.folders import folder_of
from pageferry.workloads.lifecycle import LocalWorkload
from pageferry.workloads.process import ProcessMemory
from pageferry.workloads.protocols import Workload

_HANDOVER = 1.0
"""Seconds within which one pager goes on for another."""

Answer = TypeVar("Answer", bound=msgspec.Struct)


class AcquiredPager(Protocol):
    """A pager that is held. Calls may take long: they are not for the event loop."""

    userfaults: dict[int, int]
    """Process -> a descriptor, in our own process, of the userfaultfd that its memory is registered with."""
    large: list[list[bool]]
    """Per region, which 2 MiB units will stand on large pages when their contents are there."""

    def ensure(self, region: int, first: int, count: int) -> None:
        """Have pages in memory, counted in the region. Raises RestoreError, ImageError: they cannot be had."""

    def cancel(self) -> None:
        """Have an `ensure` of another thread end, as soon as it can. Nothing can be asked for any more."""

    def release(self) -> None:
        """Let the pager go, and take off the traces. May be called twice."""


async def acquire_uffd(workload: Workload) -> AcquiredPager | None:
    """Acquire the pager of a workload, if it has one. None: everything is in memory now, and nothing traps.

    What cannot be held (a cold store, a kernel without asynchronous traces) is waited for until all of it is there.

    Raises RestoreError (its pager is gone), ImageError, WorkloadError (somebody else holds it).
    """
    found = await in_thread(_held, workload)
    if found is None:
        await wait_complete(workload, traces=False)
    return found


def large_units(memory: Memory | ProcessMemory, hold: AcquiredPager | None) -> list[list[bool]]:
    """Per region, which 2 MiB units stand on large pages, or will when a pager that is held has brought them."""
    units = memory.large_units()
    if hold is None:
        return units
    return [
        [now or late for now, late in zip(ours, theirs, strict=True)]
        for ours, theirs in zip(units, hold.large, strict=True)
    ]


def _held(workload: Workload) -> AcquiredPager | None:
    if isinstance(workload, LocalWorkload) and workload.pager is not None:
        return _held_here(workload.name, workload.pager)
    folder = folder_of(workload)
    if folder is None or not records.is_restoring(folder):
        return None
    record = folder.load(records.RECORD, Deferred)
    if record is not None and record.cold is not None:
        return None
    line = _connected(folder)
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
    """A pager of this process."""

    def __init__(self, pager: Pager, userfaults: dict[int, int]) -> None:
        self.userfaults = userfaults
        self.large = [pager.large(0)]
        self._pager = pager

    def ensure(self, region: int, first: int, count: int) -> None:
        """As of `AcquiredPager`."""
        assert region == 0, "an arena has one"
        load_pages(self._pager, first, count)

    def cancel(self) -> None:
        """Nothing: an arena's image is a local file."""

    def release(self) -> None:
        """As of `AcquiredPager`."""
        self._pager.release()


class _PagerElsewhere:
    """A pager that answers on a socket. It is released when the connection is closed, whoever closes it."""

    def __init__(self, line: _Line, given: HoldGiven) -> None:
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
        """As of `AcquiredPager`."""
        self._line.ask(PagerRequest(what="ensure", region=region, first=first, count=count), PagerStatus)

    def cancel(self) -> None:
        """As of `AcquiredPager`."""
        self._line.cut()

    def release(self) -> None:
        """As of `AcquiredPager`."""
        with contextlib.suppress(RestoreError, ImageError):  # it has ended, with its workload
            self._line.ask(PagerRequest(what="release"), PagerStatus)
        self._close()

    def _close(self) -> None:
        while self.userfaults:
            os.close(self.userfaults.popitem()[1])
        self._line.close()


class _Line:
    """A connection to a pager, for one question at a time."""

    def __init__(self, folder: Folder, connection: socket.socket) -> None:
        self.folder = folder
        self._connection = connection
        self._answers = connection.makefile("rb")

    def ask(self, question: PagerRequest, kind: type[Answer]) -> Answer:
        """Raises RestoreError, ImageError."""
        try:
            self._connection.sendall(msgspec.json.encode(question) + b"\n")
            line = self._answers.readline()
            if not line:
                raise ConnectionResetError("it hung up")
            answer = msgspec.json.decode(line, type=kind)
        except (OSError, ValueError) as failed:
            raise client.gone(self.folder, failed) from failed
        if isinstance(answer, PagerStatus):
            client.check(answer)
        return answer

    def cut(self) -> None:
        """Whoever waits for an answer gets none."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """May be called twice."""
        self._answers.close()
        self._connection.close()


def _connected(folder: Folder) -> _Line:
    """A connection to the pager: to the next one, where one goes on for another. Raises RestoreError."""
    deadline = time.monotonic() + _HANDOVER
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(folder.path / records.SOCKET))
        except OSError as failed:
            connection.close()
            if time.monotonic() > deadline:
                raise client.gone(folder, failed) from failed
            time.sleep(0.02)
        else:
            return _Line(folder, connection)


async def wait_complete(workload: Workload, *, traces: bool = True) -> None:
    """When a restore of the workload is under way, have all of it in memory, and its traps gone.

    `traces`: take off the trace that the last checkpoint left, too.

    Raises RestoreError when its pager is gone, ImageError when the image cannot be read.
    """
    if isinstance(workload, LocalWorkload) and workload.pager is not None:
        pager, length = workload.pager, workload.regions[0].length
        await in_thread(load_all, pager, length)
    else:
        folder = folder_of(workload)
        if folder is not None and records.is_restoring(folder):
            await in_thread(client.wait_complete, folder)
    if traces:
        await in_thread(persistent_trace.forget, workload)


def load_pages(pager: Pager, first: int, count: int, origin: str = "") -> None:
    """Have `count` pages in memory that a pager of this process brings; `origin`: where from, for people.

    Raises ImageError for a damaged one, RestoreError where there is nobody to bring it any more.
    """
    told = f"{origin}: " if origin else ""
    try:
        pager.ensure(0, first, count)
    except ValueError as error:
        raise ImageError(f"{told}{error}") from error
    except OSError as error:
        raise RestoreError(f"{told}{error}") from error


def load_all(pager: Pager, length: int, origin: str = "") -> None:
    """Have all `length` bytes in memory, and the pager's traps gone. Raises as `load_pages`."""
    while not pager.finished:
        load_pages(pager, 0, length // SMALL_PAGE, origin)
        pager.wait(1.0)
