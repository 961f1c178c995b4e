"""Records of a workload with deferred memory (S8): files in its directory, which allow another pager to take over.

During a restore or the post-copy phase of a migration, the directory of the workload contains::

    restore.json    parameters of the restore: all that another pager needs to take over; or
    postcopy.json   the same for a post-copy migration
    pager.flags     deferred bitmap: one bit per page, set until the page is loaded
    pager.sock      request socket of the pager: one JSON object per line in each direction
    pager.log       log of the pager

When nothing is deferred, these files are removed, and the pager writes::

    restored.json   its final PagerStatus, with the windows that were accessed

If a program has obtained the descriptor of its arena's memory, no page may be evicted, and the directory contains::

    handed-out      an empty file
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
    """Record of a `memory.regions.Segment`."""

    pid: int
    address: int
    length: int
    offset: int


class RegionRecord(msgspec.Struct, frozen=True):
    """Record of a `memory.regions.Region`. The file is not recorded: `open_region` opens it through the first
    segment."""

    name: str
    length: int
    file_offset: int
    page_size: int
    segments: list[SegmentRecord]


class OwnImage(msgspec.Struct, frozen=True, kw_only=True):
    """Image of a cold store, created by reclaim and removed with the store."""

    path: str
    identity: ImageIdentity


class Deferred(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a restore in progress, or of a workload with a cold store."""

    image: str
    """Path of the image when the restore began."""
    identity: ImageIdentity
    """Identity of the image. Contents are not loaded from any other image."""
    qmp_socket: str | None
    regions: list[RegionRecord]
    userfaults: dict[int, int]
    """Number of the userfaultfd in each process, by pid."""
    prefetch: bool
    eager: bool
    cold: list[list[tuple[int, int]]] | None = None
    """Huge pages split for a cold store (S3), per region, as (first byte, length); None for a restore. All other memory
    is present. Pages are loaded on demand only. When all pages are loaded, the images in `own` are removed."""
    own: list[OwnImage] = []
    """Images that reclaim has created for this cold store. A pager removes these and no other files."""
    pausing: bool = False
    """Whether the guest has accessed an unreadable page, and QEMU has not responded to the request to pause yet."""


class PostcopyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Record of a migration in post-copy, at the destination."""

    migration: str
    source: str
    """Name of the workload at the source, shown in errors and output."""
    regions: list[RegionRecord]
    large: list[bytes]
    """Units of each region that are backed by huge pages at the source: one bit per 2 MiB, least significant bit
    first."""
    userfaults: dict[int, int]
    """Number of the userfaultfd in each process, by pid."""


def is_restoring(folder: Folder) -> bool:
    """Return whether contents of the workload's memory may be deferred."""
    return any((folder.path / name).exists() for name in (SOCKET, RECORD, POSTCOPY))


def mark_handed_out(folder: Folder) -> None:
    """Record that there may be mappings of the memory that no pager watches."""
    (folder.path / HANDED_OUT).touch(mode=0o600)


def is_handed_out(folder: Folder) -> bool:
    """Return whether there may be mappings of the memory that no pager watches. If so, no page may be evicted."""
    return (folder.path / HANDED_OUT).exists()


def record_of(region: Region) -> RegionRecord:
    """Return the record from which another process can open the region: see `open_region`."""
    segments = [SegmentRecord(one.pid, one.address, one.length, one.offset) for one in region.segments]
    return RegionRecord(region.name, region.length, region.file_offset, region.page_size, segments)


def open_region(record: RegionRecord) -> Region:
    """Open the region of a record. The caller closes its file. Raises WorkloadError."""
    segments = tuple(Segment(one.pid, one.address, one.length, one.offset) for one in record.segments)
    first = segments[0]
    for mapping in proc.file_mappings(first.pid):
        if mapping.address <= first.address < mapping.address + mapping.length:
            descriptor = proc.open_mapped_file(first.pid, mapping)
            return Region(record.name, record.length, descriptor, record.file_offset, record.page_size, segments)
    raise WorkloadError(f"cannot open region {record.name}: process {first.pid} no longer maps it")


def create_flags(folder: Folder | None, length: int) -> int:
    """Create and lock a deferred bitmap, in a directory or as an unnamed file. Return its descriptor, which the caller
    closes.

    Raises UsageError if a pager is running.
    """
    if folder is None:
        descriptor = os.memfd_create("pager-flags")
    else:
        descriptor = os.open(folder.path / FLAGS, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _lock(folder, descriptor)
    os.ftruncate(descriptor, length)
    return descriptor


def open_flags(folder: Folder, length: int) -> int:
    """Open and lock the deferred bitmap that another pager has left, and return its descriptor, which the caller
    closes.

    The lock ensures that only one pager runs. Raises UsageError if the other pager is running, RestoreError if the
    length of the bitmap does not match the memory.
    """
    descriptor = os.open(folder.path / FLAGS, os.O_RDWR | os.O_CLOEXEC)
    _lock(folder, descriptor)
    if os.fstat(descriptor).st_size != length:
        os.close(descriptor)
        raise RestoreError(f"cannot use {folder.path / FLAGS}: its length does not match the memory of {folder.name}")
    return descriptor


def _lock(folder: Folder, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as busy:
        os.close(descriptor)
        raise UsageError(f"cannot take over {folder.name}: its pager is running") from busy
