"""Records of a workload whose memory is deferred (S8): files in its folder, from which any pager can continue.

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
"""

from __future__ import annotations

import fcntl
import os

import msgspec

from pageferry.errors import RestoreError, UsageError, WorkloadError
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


class PostcopyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A migration in post-copy: the workload runs here, and its pages come."""

    migration: str
    source: str
    """Name of the workload there, for people."""
    regions: list[RegionRecord]
    large: list[bytes]
    """Per region, which 2 MiB units stand on large pages at the source: a bit each, the lowest first."""
    userfaults: dict[int, int]
    """As in `Deferred`."""


def is_restoring(folder: Folder) -> bool:
    """Whether contents of the workload's memory may still be to come."""
    return any((folder.path / name).exists() for name in (SOCKET, RECORD, POSTCOPY))


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
