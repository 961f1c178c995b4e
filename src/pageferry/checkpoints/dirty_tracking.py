"""What a checkpoint does about write traces: it takes up the one that its parent left, and leaves one for its child."""

from __future__ import annotations

import os
from typing import Literal, TypedDict

from pageferry.checkpoints.options import Options
from pageferry.host.faults import fault_point
from pageferry.images.image import ImageFile
from pageferry.memory.view import Memory
from pageferry.workloads import persistent_trace
from pageferry.workloads.deferred_access import AcquiredPager
from pageferry.workloads.persistent_trace import Unusable
from pageferry.workloads.protocols import Workload

Means = Literal["trace", "compare", "none"]
"""How what the parent holds already was found; `none`: there is no parent."""


class Descriptors(TypedDict, total=False):
    """Arguments of a `Saver`."""

    leave: dict[int, int]
    take_up: dict[int, int]
    begin: dict[int, int]
    borrow: dict[int, int]


class Tracking:
    """The traces of one checkpoint. Its calls may take a process a millisecond: they are not for the event loop."""

    def __init__(
        self, workload: Workload, memory: Memory, parent: ImageFile | None, options: Options, hold: AcquiredPager | None
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
        """The workload does direct I/O."""
        self.pinned = False
        """Memory stays pinned: no trace reports what is written there."""
        self._ours: dict[int, int] = {}

    def take_up(self) -> None:
        """Look for a trace since the parent. Where there is none that can be used, nothing of it is left."""
        if self._hold is not None:
            self.note = "its memory was still coming"
            self.leaves = False  # a trace by the userfaultfd of a pager goes with the pager
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
        """The trace cannot be used after all."""
        self.note, self.means = why, "none" if self.parent is None else "compare"
        self._hold = None
        self.leaves = self.leaves and not self.direct_io  # it would be begun in rounds again
        self._let_go()
        persistent_trace.forget(self.workload)

    def descriptors(self) -> Descriptors:
        """For the saver, which is to be made now."""
        if self._hold is not None:
            return {"borrow": self._hold.userfaults}
        if self.means == "trace":
            return {"take_up": self._ours}
        if not self.leaves:
            return {}
        self._ours = persistent_trace.begin(self.workload, self.memory.segments)
        fault_point("checkpoint.trace-begun")
        # Pages can be pinned while a trap is exchanged for a trace, which reports neither the pin nor what follows: for
        # a workload that does direct I/O the trace is on before anything is read.
        return {"begin": self._ours} if self.direct_io else {"leave": self._ours}

    def finish(self, image: tuple[str, str] | None) -> bool:
        """The image (id, digest) is there, or there is none. Returns whether a trace tells what is written since."""
        self._let_go()
        if image is not None and self.leaves:
            fault_point("checkpoint.trace-left")
            return persistent_trace.leave(self.workload, self.memory.segments, image)
        persistent_trace.forget(self.workload)
        return False

    def _let_go(self) -> None:
        for descriptor in self._ours.values():
            os.close(descriptor)
        self._ours = {}


def _identity(parent: ImageFile) -> tuple[str, str]:
    return parent.image.id.hex(), f"{parent.image.digest:016x}"
