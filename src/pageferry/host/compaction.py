"""Free huge pages of the kernel, and memory compaction, which creates more of them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from pageferry.host import proc

BUDDYINFO = Path("/proc/buddyinfo")
"""File with the number of free blocks by zone and order (proc(5))."""
COMPACT = Path("/proc/sys/vm/compact_memory")
"""File that compacts all zones when root writes to it (Documentation/admin-guide/sysctl/vm.rst)."""

_ORDER = 9
"""Order of a 2 MiB block: 2^9 base pages."""
_TIMEOUT = 2.0
"""Seconds to wait for compaction. On large hosts, compaction takes longer, and continues while the first huge pages are
used."""

log = logging.getLogger(__name__)


def free_large_pages(buddyinfo: Path = BUDDYINFO) -> int:
    """Return the number of huge pages available without compaction. A larger free block counts as several."""
    free = 0
    for line in proc.lines(buddyinfo.read_bytes()):
        _, *counts = line.partition(b" zone ")[2].split()
        free += sum(int(count) << order for order, count in enumerate(counts[_ORDER:]))
    return free


def compact_memory(wanted: int, *, buddyinfo: Path = BUDDYINFO, compact: Path = COMPACT) -> int:
    """Compact memory if fewer than `wanted` huge pages are free. Return the number of free huge pages afterwards.

    The kernel also compacts when a huge page is allocated, but briefly, and less after each failure: on a host with
    fragmented memory, most of a guest would be backed by base pages. Without root, memory is not compacted.
    """
    try:
        free = free_large_pages(buddyinfo)
    except OSError as error:  # a container may hide the file
        log.info("cannot count free huge pages: %s", error)
        return 0
    if free >= wanted:
        return free
    # The thread is a daemon: the program does not wait for it at exit, and the exit of the program ends the write.
    thread = threading.Thread(target=_compact, args=(compact,), name="pageferry-compaction", daemon=True)
    thread.start()
    thread.join(_TIMEOUT)
    found = free_large_pages(buddyinfo)
    log.info("free huge pages: %d of %d before compaction, %d after it", free, wanted, found)
    return found


def _compact(path: Path) -> None:
    try:
        path.write_text("1")
    except OSError as error:
        log.info("cannot compact memory: %s", error)
