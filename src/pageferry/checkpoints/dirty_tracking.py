"""Write traces of a checkpoint: the trace since the checkpoint of the parent, and the trace left for the checkpoint of
a child."""

from __future__ import annotations

import os
from typing import Literal

from pageferry.checkpoints.options import Options
from pageferry.host.fault_points import fault_point
from pageferry.images.image import ImageFile
from pageferry.memory.view import Memory
from pageferry.workloads import persistent_trace
from pageferry.workloads.deferred_access import AcquiredPager
from pageferry.workloads.persistent_trace import Unusable
from pageferry.workloads.protocols import Live

Means = Literal["trace", "compare", "private", "none"]
"""Method of finding the pages that the parent contains: its write trace, or a comparison; `private` for a clone, of
which only the private pages differ from the parent; `none` without a parent."""


Traces = tuple[Literal["leave", "take-up", "begin", "borrow", "private"], dict[int, int]]
"""Parameter `traces` of a `Saver`: its use of the write traces, and the userfaultfds by process ID."""


class Tracking:
    """Write traces of one checkpoint. Methods can block for a millisecond per process, and must not be called from the
    event loop."""

    def __init__(
        self,
        workload: Live,
        memory: Memory,
        parent: ImageFile | None,
        options: Options,
        hold: AcquiredPager | None,
    ) -> None:
        self.workload = workload
        self.memory = memory
        self.parent = parent
        chained = parent is not None if options.track is None else options.track
        self.leaves = chained and options.mode == "lazy"
        self.means: Means = "none" if parent is None else "compare"
        self.note = ""
        self._hold = hold
        self.direct_io = False
        """Whether the workload does direct I/O."""
        self.pinned = False
        """Whether buffers in the memory are registered with io_uring.

        Such buffers stay pinned, and traces do not report I/O into them.
        """
        self._ours: dict[int, int] = {}

    def take_up(self) -> None:
        """Take over the trace since the parent if it can be used; otherwise remove any trace, and record the reason in
        `note`."""
        if self._hold is not None:
            self.note = "its memory was still being loaded"
            self.leaves = False  # a trace on the pager's userfaultfd ends with the pager
        elif self.pinned:
            self.note = "buffers in its memory are registered with io_uring"
        elif self.parent is not None:
            try:
                self._ours = persistent_trace.take_up(self.workload, self.memory.segments, _identity(self.parent))
                self.means = "trace"
                fault_point("checkpoint.trace-taken")
                return
            except Unusable as why:
                self.note = str(why)
        persistent_trace.forget(self.workload)

    def lost(self, why: str) -> None:
        """Record that the trace cannot be used, and remove it."""
        self.note, self.means = why, "none" if self.parent is None else "compare"
        self._hold = None
        self.leaves = self.leaves and not self.direct_io  # a new trace would require rounds again
        self._close()
        persistent_trace.forget(self.workload)

    def traces(self) -> Traces | None:
        """Return the traces for the saver; None if it uses none. Begin a trace first if `leaves` is True."""
        if self._hold is not None:
            return "borrow", self._hold.userfaults
        if self.means == "trace":
            return "take-up", self._ours
        if not self.leaves:
            return None
        self._ours = persistent_trace.begin(self.workload, self.memory.segments)
        fault_point("checkpoint.trace-begun")
        # Pages can be pinned while a trap is replaced by a trace, which reports neither the pin nor later writes. With
        # direct I/O, the trace is therefore installed before any page is read.
        return ("begin" if self.direct_io else "leave"), self._ours

    def finish(self, image: tuple[str, str] | None) -> bool:
        """Leave the trace for a child of `image` (id and digest). Remove it if `image` is None or `leaves` is False.
        Return whether a trace was left."""
        self._close()
        if image is not None and self.leaves:
            fault_point("checkpoint.trace-left")
            return persistent_trace.leave(self.workload, self.memory.segments, image)
        persistent_trace.forget(self.workload)
        return False

    def _close(self) -> None:
        for descriptor in self._ours.values():
            os.close(descriptor)
        self._ours = {}


def _identity(parent: ImageFile) -> tuple[str, str]:
    return parent.image.id.hex(), f"{parent.image.digest:016x}"
