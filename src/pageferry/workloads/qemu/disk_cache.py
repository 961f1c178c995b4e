"""Flushing of the host's page cache for the disks of a running guest, which shortens its next pause.

QEMU flushes all disks when it stops a guest (QMP `stop`, and at the end of its migration). With dirty pages in the page
cache, this takes as long as the storage needs to write them. pageferry therefore flushes the files while the guest
runs, until a flush is short.

Each file is opened again through /proc/PID/fd: the kernel reports a write error once to every open file. If pageferry
flushed through a duplicate of QEMU's descriptor (pidfd_getfd(2)), it could take an error that QEMU must report to the
guest.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence

from pageferry.host.blocking import on_thread

SHORT = 0.005
"""Duration of a pass below which no further pass is made, seconds."""
_MAX_PASSES = 20

log = logging.getLogger(__name__)


async def flush_beside(places: Sequence[str]) -> None:
    """Run `flush` in a thread. On cancellation, wait until the flush of the current file has returned, and flush no
    other file: the guest may already be paused."""
    cancelled = threading.Event()
    await on_thread(lambda: flush(places, cancelled.is_set), cancelled.set)


def flush(places: Sequence[str], stopped: Callable[[], bool] = lambda: False) -> int:
    """Flush files, given by paths, until a pass over all of them takes less than `SHORT` seconds or is not shorter than
    the pass before. Return the number of passes. Before each file, end if `stopped` returns True.

    Files that this user cannot open are left out. Write errors are logged; QEMU and its guest receive them too.
    """
    before = float("inf")
    for number in range(1, _MAX_PASSES + 1):
        started = time.perf_counter()
        for place in places:
            if stopped():
                return number
            _flush(place)
        took = time.perf_counter() - started
        if took < SHORT or took >= before:
            return number
        before = took
    return _MAX_PASSES


def _flush(place: str) -> None:
    try:
        found = os.open(place, os.O_PATH | os.O_CLOEXEC)
        try:
            mode = os.fstat(found).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                return  # another process of the guest's user has replaced the file
            descriptor = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        finally:
            os.close(found)
    except OSError as error:
        log.debug("%s: not flushed: %s", place, error.strerror)
