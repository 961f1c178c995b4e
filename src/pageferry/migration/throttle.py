"""Auto-converge: a workload that modifies memory faster than the link takes it gets less and less CPU time.

For as long as pages are copied, and no longer: it is lifted before the pause, none of which waits for it.
Named after QEMU's `auto-converge`; there the hypervisor makes its vCPUs sleep, here the kernel limits the processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from logging import getLogger

from pageferry.errors import PageferryError, WorkloadDied
from pageferry.host import proc
from pageferry.host.cpu_quota import CpuQuota
from pageferry.memory.regions import Region
from pageferry.migration.native import off_loop

log = getLogger(__name__)

STEPS = (20, 50, 80, 95, 99)
"""Per cent that are taken from it, one step after each round that did not get further (`cpu-throttle-percentage`)."""


class Throttle:
    """Takes CPU time from the processes of a workload, compared with what they have used since this was made."""

    def __init__(self, name: str, regions: Sequence[Region]) -> None:
        self._name = name
        self._pids = sorted({segment.pid for region in regions for segment in region.segments})
        self._steps = iter(STEPS)
        self._since = time.monotonic()
        self._used = self._cpu_seconds()
        self._usual = 0.0
        self._quota: CpuQuota | None = None
        self.percentage = 0
        """That is taken from it now."""
        self.highest = 0

    async def tighten(self) -> bool:
        """The next step; False when that is not possible, of which the user is told.

        Raises WorkloadDied.
        """
        percentage = next(self._steps)
        try:
            if self._quota is None:
                self._usual = (self._cpu_seconds() - self._used) / (time.monotonic() - self._since)
                self._quota = await off_loop(lambda: CpuQuota(self._pids))
            self._quota.limit(self._usual * (1 - percentage / 100))
        except WorkloadDied:
            raise
        except PageferryError as error:
            log.warning(
                "%s cannot be slowed down (%s), and --auto-converge does nothing: see `pageferry check`, cpu-quota",
                self._name,
                error,
            )
            return False
        self.percentage = self.highest = percentage
        return True

    def lift(self) -> None:
        """It may run as fast as it likes again; takes microseconds."""
        if self._quota is not None:
            with contextlib.suppress(OSError):  # with its processes the group may be gone
                self._quota.lift()
        self.percentage = 0

    async def close(self) -> None:
        """Lift it for good, and leave nothing of it."""
        quota, self._quota, self.percentage = self._quota, None, 0
        if quota is not None:
            await off_loop(quota.close)

    def _cpu_seconds(self) -> float:
        return sum(map(proc.cpu_seconds, self._pids))
