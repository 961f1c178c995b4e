"""Memory whose contents are still to come (S8): how to ask the pager of a workload about it, and for it.

A workload whose restore is under way, or which runs here before all of its pages have (post-copy), has in its folder::

    restore.json    what is being restored, and with what: all that another pager needs to go on; or
    postcopy.json   the same of a migration
    pager.flags     one bit per page, set while its contents are still to come
    pager.sock      where its pager answers questions, one JSON object per line each way
    pager.log       what the pager has to say

The folder of an arena whose descriptor its program has taken, so that nothing of it may be deferred again, holds::

    handed-out      an empty file

The others go when everything is there, and a last one comes::

    restored.json   what the pager said at its end: a PagerStatus, with what was touched

Who reads the memory of a workload past its page tables asks `ensure` first. A migration or a checkpoint puts
traces on its page tables, and holds the pager for that: see `holding`. Who needs them for himself asks for everything,
with `settle`.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Literal

import msgspec

from pageferry.errors import ImageError, RestoreError, UsageError, WorkloadError
from pageferry.events import Event
from pageferry.host import proc
from pageferry.host.registry import Folder
from pageferry.images.metadata import ImageIdentity
from pageferry.memory.regions import Region, Segment

RECORD = "restore.json"
POSTCOPY = "postcopy.json"
FLAGS = "pager.flags"
SOCKET = "pager.sock"
SUMMARY = "restored.json"
LOG = "pager.log"
HANDED_OUT = "handed-out"

_TIMEOUT = 5.0
"""Seconds for an answer that takes no reading."""

_HANDOVER = 1.0
"""Seconds within which one pager goes on for another."""


MOST_TOUCHED = 16384
"""Windows in one answer."""


class SegmentRecord(msgspec.Struct, frozen=True):
    """As `memory.regions.Segment`."""

    pid: int
    address: int
    length: int
    offset: int


class RegionRecord(msgspec.Struct, frozen=True):
    """As `memory.regions.Region`, without its file: that is what is mapped at the segments."""

    name: str
    length: int
    file_offset: int
    page_size: int
    segments: list[SegmentRecord]


class OwnImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image that reclaim created: an image file of a cold store, to be removed with it."""

    path: str
    identity: ImageIdentity


class Deferred(msgspec.Struct, frozen=True, kw_only=True):
    """A restore under way, or memory of which a part is in a cold store."""

    image: str
    """Path of the image when the restore began."""
    identity: ImageIdentity
    """Of that image: contents come from no other one."""
    qmp_socket: str | None
    regions: list[RegionRecord]
    userfaults: dict[int, int]
    """Process -> number of its userfaultfd, in that process."""
    prefetch: bool
    eager: bool
    cold: list[list[tuple[int, int]]] | None = None
    """Of a cold store (S3): the broken large pages per region, as (first byte, length); all else is in memory. Contents
    come on access only, and the images in `own` are removed with the last of them."""
    own: list[OwnImage] = []
    """Images that reclaim created for this cold store. A pager removes these and no other file."""


class Arriving(msgspec.Struct, frozen=True, kw_only=True):
    """A migration in post-copy: the workload runs here, and its pages come."""

    migration: str
    source: str
    """Name of the workload there, for people."""
    regions: list[RegionRecord]
    large: list[bytes]
    """Per region, which 2 MiB units stand on large pages at the source: a bit each, the lowest first."""
    userfaults: dict[int, int]
    """As in `Deferred`."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A question to a pager. `ensure` is answered when the pages are there, `settle` when nothing traps any more.

    `hold` is answered by `HoldGiven`, and holds until `release`, or until the connection is closed.
    """

    what: Literal["status", "touched", "ensure", "settle", "hold", "release", "stop"]
    region: int = 0
    first: int = 0
    """Page of the region; of `touched`, the number of windows that are known already."""
    count: int = 0
    """Pages of the region."""


class HoldGiven(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `hold`."""

    pager: int
    """Pid of the pager's process."""
    userfaults: dict[int, int] | None = None
    """Process of the workload -> number of its userfaultfd, in the pager's process. None: it is not held, because it
    cannot be, because everything is there, or because it is `busy`."""
    large: list[bytes] = []
    """Per region, a byte for each 2 MiB unit: 1 where it will stand on a large page."""
    busy: bool = False
    """Somebody else holds it."""


class PagerStatus(Event, frozen=True, kw_only=True, tag="pager"):
    """The answer to every other question."""

    image: str
    pager: int
    """Pid of the pager's process."""
    identity: ImageIdentity | None = None
    """Identity of the image; None where contents come from a peer."""
    deferred: int
    """Bytes whose contents are still to come."""
    finished: bool
    """Everything is there, and nothing traps any more."""
    faults: int
    missed: int
    loaded: int
    prefetched: int
    bytes_read: int
    service: float
    """Seconds spent on all faults together."""
    longest: float
    histogram: list[int]
    """Faults by time of service: number k of those that took less than 2^k us, and 2^(k-1) us or more."""
    failures: list[str]
    """Pages that cannot be had: what is wrong, and where."""
    accessed: int
    """How many of these the workload waits for."""
    touched: list[int] = msgspec.field(default_factory=list)
    """The answer to `touched`: further windows of 16 pages in the order of their first fault."""
    flags: str = ""
    """Where the pager's flags are, if not in the workload's folder: those of a program that restores its own arena."""
    paused: str | None = None
    """Why nothing comes: the link to the source has gone."""
    error: str | None = None
    """Why what was asked for could not be done."""

    @property
    def waiting(self) -> str | None:
        """Why contents do not come, in a line: the link is gone, or a page cannot be had. None: they do."""
        return self.paused or next(iter(self.failures), None)


def is_restoring(folder: Folder) -> bool:
    """Whether contents of the workload's memory may still be to come."""
    return any((folder.path / name).exists() for name in (SOCKET, RECORD, POSTCOPY))


def ask(folder: Folder, question: Ask, timeout: float | None = _TIMEOUT) -> PagerStatus | None:
    """The pager's answer; None where there is no restore under way.

    Raises RestoreError when there is one and nobody answers, ImageError when the image cannot be read.
    """
    if not is_restoring(folder):
        return None
    deadline = time.monotonic() + _HANDOVER
    while True:
        try:
            status = _exchange(folder.path / SOCKET, question, timeout)
            break
        except (OSError, msgspec.MsgspecError) as failed:
            if not is_restoring(folder):  # it has just been finished
                return None
            if time.monotonic() > deadline:
                if _is_over(folder, failed):
                    (folder.path / SOCKET).unlink(missing_ok=True)  # so that the next one need not wait
                    return None
                raise gone(folder, failed) from failed
        time.sleep(0.02)
    check(status)
    return status


def check(status: PagerStatus) -> None:
    """Raises what the pager has to say of what it could not do: RestoreError, ImageError."""
    if status.error is not None:
        raise RestoreError(status.error) if status.paused is not None else ImageError(status.error)


def gone(folder: Folder, failed: Exception) -> RestoreError:
    """What is to be said when a pager does not answer."""
    return RestoreError(
        f"the pager of {folder.name} does not answer ({failed}): its memory is still coming from "
        f"{_next_pager(folder)} starts another pager"
    )


def _is_over(folder: Folder, failed: Exception) -> bool:
    """Whether a pager died with nothing left to do: it takes its record away first, then its socket."""
    recorded = any((folder.path / name).exists() for name in (RECORD, POSTCOPY))
    return isinstance(failed, ConnectionRefusedError) and not recorded


def status(folder: Folder) -> PagerStatus | None:
    """How far the restore of a workload is; None where there is none under way. Raises RestoreError."""
    return ask(folder, Ask(what="status"))


def coming(folder: Folder) -> tuple[int, tuple[str, ImageIdentity] | None] | None:
    """Return the deferred bits of a workload, and the image that holds those pages; None where no page is deferred.

    The bits are a descriptor, the caller's to close. The image is None where none is known: contents of another host,
    or of a cold store, which are loaded on demand only. Raises RestoreError.
    """
    record = folder.load(RECORD, Deferred)
    image = (record.image, record.identity) if record is not None and record.cold is None else None
    path = str(folder.path / FLAGS)
    if record is None and not (folder.path / POSTCOPY).exists():
        answer = status(folder)
        if answer is None or not answer.flags:
            return None
        image = (answer.image, answer.identity) if answer.identity is not None else None
        path = answer.flags
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC), image
    except FileNotFoundError:  # it has just been finished
        return None


def ensure(folder: Folder, region: int, first: int, count: int) -> None:
    """Have pages of a region in memory, for who reads them there. Raises RestoreError, ImageError."""
    ask(folder, Ask(what="ensure", region=region, first=first, count=count), None)


def settle(folder: Folder) -> None:
    """Have everything in memory, and the workload's page tables to oneself. Raises RestoreError, ImageError."""
    ask(folder, Ask(what="settle"), None)


def mark_handed_out(folder: Folder) -> None:
    """From here on there may be mappings of the memory that no pager knows."""
    (folder.path / HANDED_OUT).touch(mode=0o600)


def is_handed_out(folder: Folder) -> bool:
    """Whether there may be mappings of the memory that no pager knows: nothing of it may leave memory."""
    return (folder.path / HANDED_OUT).exists()


def record_of(region: Region) -> RegionRecord:
    """What another process needs to open the region: see `open_region`."""
    segments = [SegmentRecord(one.pid, one.address, one.length, one.offset) for one in region.segments]
    return RegionRecord(region.name, region.length, region.file_offset, region.page_size, segments)


def open_region(record: RegionRecord) -> Region:
    """The region that was recorded; its file is the caller's to close. Raises WorkloadError."""
    segments = tuple(Segment(one.pid, one.address, one.length, one.offset) for one in record.segments)
    first = segments[0]
    for mapping in proc.file_mappings(first.pid):
        if mapping.address <= first.address < mapping.address + mapping.length:
            descriptor = proc.open_mapped_file(first.pid, mapping)
            return Region(record.name, record.length, descriptor, record.file_offset, record.page_size, segments)
    raise WorkloadError(f"{record.name} is not mapped by process {first.pid} any more")


def create_flags(folder: Folder | None, length: int) -> int:
    """A file for a pager's flags, locked (a descriptor, the caller's to close): in a folder, or nameless in memory.

    Raises UsageError where there is a pager that is alive.
    """
    if folder is None:
        descriptor = os.memfd_create("pager-flags")
    else:
        descriptor = os.open(folder.path / FLAGS, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _lock(folder, descriptor)
    os.ftruncate(descriptor, length)
    return descriptor


def open_flags(folder: Folder, length: int) -> int:
    """The flags that another pager has left, locked: there is one pager at a time.

    Raises UsageError where it is alive, RestoreError where they are of other memory.
    """
    descriptor = os.open(folder.path / FLAGS, os.O_RDWR | os.O_CLOEXEC)
    _lock(folder, descriptor)
    if os.fstat(descriptor).st_size != length:
        os.close(descriptor)
        raise RestoreError(f"{folder.path / FLAGS} is not of the memory of {folder.name}: it is of another length")
    return descriptor


def _lock(folder: Folder, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as busy:
        os.close(descriptor)
        raise UsageError(f"{folder.name} has a pager that is alive: there is nothing to take over") from busy


def _next_pager(folder: Folder) -> str:
    if (folder.path / POSTCOPY).exists():
        return f"another host; `pageferry receive --resume {folder.name}`"
    return f"an image; `pageferry restore --takeover {folder.name}`"


def _exchange(path: Path, question: Ask, timeout: float | None) -> PagerStatus:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(str(path))
        connection.sendall(msgspec.json.encode(question) + b"\n")
        with connection.makefile("rb") as answers:
            line = answers.readline()
    if not line:
        raise ConnectionResetError("it hung up")
    return msgspec.json.decode(line, type=PagerStatus)
