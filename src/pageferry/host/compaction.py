"""Large pages that the kernel has free, and memory compaction, which makes more of them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from pageferry.host import proc

BUDDYINFO = Path("/proc/buddyinfo")
"""Free blocks by zone and order (proc(5))."""
COMPACT = Path("/proc/sys/vm/compact_memory")
"""Written to by root, it compacts all zones (Documentation/admin-guide/sysctl/vm.rst)."""

_ORDER = 9
"""Of a block of 2 MiB in small pages."""
_TIMEOUT = 2.0
"""Seconds. On a host of a terabyte compaction takes longer, and goes on while its first large pages are used."""

log = logging.getLogger(__name__)


def free_large_pages(buddyinfo: Path = BUDDYINFO) -> int:
    """Large pages that can be had without compaction: a free block of more than 2 MiB counts as several."""
    free = 0
    for line in proc.lines(buddyinfo.read_bytes()):
        _, *counts = line.partition(b" zone ")[2].split()
        free += sum(int(count) << order for order, count in enumerate(counts[_ORDER:]))
    return free


def compact_memory(wanted: int, *, buddyinfo: Path = BUDDYINFO, compact: Path = COMPACT) -> int:
    """Compact memory where the kernel has fewer large pages free than `wanted`; how many it has free then.

    One allocation by itself makes the kernel try, too, but not for long, and less after every failure: where memory is
    fragmented most of a guest would end on small pages. Without root nothing is done.
    """
    try:
        free = free_large_pages(buddyinfo)
    except OSError as error:  # a container that does not show it
        log.info("cannot count free huge pages: %s", error)
        return 0
    if free >= wanted:
        return free
    # Not to be waited for at the end of the program, which ends it.
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
