"""Replacement of a guest's memory with a private mapping of a base, before the guest runs.

Correctness depends on the order of the steps. An access to a hole of the base through a mapping that is not registered
would fill the hole with zeros, for every clone. The new mapping therefore permits no access until it is registered::

    mmap(PROT_NONE, MAP_PRIVATE|MAP_FIXED)  the scratch file of QEMU is no longer mapped
    madvise(MADV_DONTFORK)                  a child of QEMU would read holes as zeros
    UFFDIO_REGISTER (missing faults)        every access to a hole waits for the pager
    mprotect(PROT_READ|PROT_WRITE)
    mlock2(MLOCK_ONFAULT)                   QEMU cannot discard pages: the contents of the base would return
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from pageferry._engine import Advice, BasePager, Space
from pageferry.errors import UnsupportedError
from pageferry.host.fault_points import fault_point
from pageferry.host.smaps import smaps
from pageferry.memory.regions import LARGE_PAGE, SMALL_PAGE
from pageferry.pager.base_records import CloneRecord
from pageferry.pager.records import RegionRecord, SegmentRecord

OWN = "use `--memory own`"
_LIMITS = (errno.EPERM, errno.ENOMEM, errno.EAGAIN)


def base_offsets(regions: Sequence[RegionRecord]) -> list[int]:
    """Return the start of each region in the base, bytes. Each region starts at a huge page."""
    offsets, at = [], 0
    for region in regions:
        offsets.append(at)
        at += -(-region.length // LARGE_PAGE) * LARGE_PAGE
    return offsets


def check_replaceable(record: CloneRecord) -> None:
    """Raise UnsupportedError if the memory of a guest cannot be replaced."""
    _excluded_from_dumps(record)


class CloneMemory:
    """Memory of one clone, in the process of its QEMU. The constructor raises UnsupportedError for memory that cannot
    be replaced."""

    def __init__(self, space: Space, record: CloneRecord) -> None:
        self._space = space
        self._record = record
        self._excluded = _excluded_from_dumps(record)

    def replace(self, descriptor: int) -> None:
        """Replace the mappings with private mappings of the base that permit no access. `descriptor`: number of the
        descriptor of the base in the process."""
        for segment, offset in self._placed():
            self._space.map_private(segment.address, segment.length, descriptor, offset)
            self._space.madvise(segment.address, segment.length, Advice.DONTFORK)
        fault_point("clone.replaced")

    def open(self, userfault: int) -> None:
        """Register the mappings with a userfaultfd, and permit access. Raises UnsupportedError if the pages cannot be
        locked."""
        for segment, _ in self._placed():
            BasePager.register(userfault, segment.address, segment.length)
        fault_point("clone.registered")
        for segment, _ in self._placed():
            self._space.make_writable(segment.address, segment.length)
            self._space.madvise(segment.address, segment.length, Advice.HUGEPAGE)
            if segment.address in self._excluded:
                self._space.madvise(segment.address, segment.length, Advice.DONTDUMP)
            self._lock(segment)

    def _lock(self, segment: SegmentRecord) -> None:
        try:
            self._space.lock_on_fault(segment.address, segment.length)
        except OSError as refused:
            if refused.errno not in _LIMITS:
                raise
            raise UnsupportedError(
                f"cannot share the memory of the image: the pages of QEMU cannot be locked ({refused.strerror}), "
                f"and a balloon could discard them; raise RLIMIT_MEMLOCK to the size of the guest, or {OWN}"
            ) from refused

    def _placed(self) -> Iterator[tuple[SegmentRecord, int]]:
        """Yield the mappings, each with its start in the base."""
        for region, start in zip(self._record.regions, base_offsets(self._record.regions), strict=True):
            for segment in region.segments:
                yield segment, start + segment.offset


def _excluded_from_dumps(record: CloneRecord) -> frozenset[int]:
    """Return the addresses of mappings that are excluded from core dumps. Raises UnsupportedError for memory that
    cannot be replaced."""
    addresses = {segment.address for region in record.regions for segment in region.segments}
    found = [one for one in smaps(record.pid) if one.mapping.address in addresses]
    if any("lo" in one.flags for one in found):
        raise UnsupportedError(
            f"cannot share the memory of the image: guest memory is locked; remove mem-lock=on, or {OWN}"
        )
    if any(region.page_size != SMALL_PAGE for region in record.regions):
        raise UnsupportedError(f"cannot share the memory of the image: guest memory is on hugetlbfs; {OWN}")
    return frozenset(one.mapping.address for one in found if "dd" in one.flags)
