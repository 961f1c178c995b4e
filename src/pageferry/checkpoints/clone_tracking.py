"""Write trace of a clone during a checkpoint (S4): it reports private pages that are written, and pages that become
private."""

from __future__ import annotations

import contextlib

from pageferry.checkpoints.dirty_tracking import Means, Traces
from pageferry.checkpoints.options import Mode
from pageferry.workloads.clone_view import PrivateMemory


class CloneTracking:
    """Trace of one checkpoint of a clone, with the interface of `dirty_tracking.Tracking`.

    A lock excludes other traces (see `PrivateMemory.traceable`). After the checkpoint, the registration for writes
    remains, because the kernel cannot remove it alone. The next write to a protected page unprotects the page.
    """

    means: Means = "private"
    note = ""
    leaves = False

    def __init__(self, memory: PrivateMemory, mode: Mode) -> None:
        self._memory = memory
        self._mode = mode
        self._userfaults: dict[int, int] = {}
        self._opened = contextlib.ExitStack()

    def traces(self) -> Traces | None:
        """Return the trace for the saver; None in mode `stop`. Raises WorkloadError if another checkpoint traces the
        clone, OSError."""
        if self._mode == "stop":
            return None
        if not self._userfaults:
            self._userfaults = self._opened.enter_context(self._memory.traceable("a checkpoint"))
        return "private", self._userfaults

    def lost(self, why: str) -> None:
        """Record that the trace cannot be used. The pages are then saved in the pause."""
        self.note, self._mode = why, "stop"
        self._close()

    def finish(self, image: tuple[str, str] | None) -> bool:
        """End the trace. Return False: no trace is left."""
        del image
        self._close()
        return False

    def _close(self) -> None:
        self._opened.close()
        self._userfaults = {}
