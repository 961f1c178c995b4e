"""CPU throttling of workloads that modify memory faster than it is sent (auto-converge, as in QEMU).

The limit applies only while pages are copied, and is removed before the pause. QEMU makes vCPUs sleep; pageferry has
the kernel limit the CPU time of the processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from logging import getLogger

from pageferry.errors import PageferryError, WorkloadDied
from pageferry.host import proc
from pageferry.host.cpu_quota import CpuQuota
from pageferry.memory.regions import Placed
from pageferry.migration.engine_call import off_loop

log = getLogger(__name__)

STEPS = (20, 50, 80, 95, 99)
"""Throttle percentages, in the order in which they are applied after rounds without progress."""


class Throttle:
    """Limit on the CPU time of a workload's processes, relative to their usage since this object was created."""

    def __init__(self, name: str, regions: Sequence[Placed]) -> None:
        self._name = name
        self._pids = sorted({segment.pid for region in regions for segment in region.segments})
        self._steps = iter(STEPS)
        self._since = time.monotonic()
        self._used = self._cpu_seconds()
        self._usual = 0.0
        self._quota: CpuQuota | None = None
        self.percentage = 0
        """Current throttle percentage."""
        self.highest = 0
        """Highest throttle percentage so far."""

    async def tighten(self) -> bool:
        """Apply the next throttle step. Return False, after a warning, if no limit can be set.

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
                "%s: not throttled: %s; rounds continue without --auto-converge (see `pageferry check`, cpu-quota)",
                self._name,
                error,
            )
            return False
        self.percentage = self.highest = percentage
        return True

    def lift(self) -> None:
        """Remove the limit, which takes microseconds."""
        if self._quota is not None:
            with contextlib.suppress(OSError):  # the group may have been removed with its processes
                self._quota.lift()
        self.percentage = 0

    async def close(self) -> None:
        """Remove the limit permanently, with its control group and guardian."""
        quota, self._quota, self.percentage = self._quota, None, 0
        if quota is not None:
            await off_loop(quota.close)

    def _cpu_seconds(self) -> float:
        return sum(map(proc.cpu_seconds, self._pids))
