"""The run state of a QEMU guest and its machine, as last seen, and what other clients change meanwhile.

QMP `stop` does nothing to a guest that does not run: it may have shut down, panicked, or been paused by another client
since the last look. Only the event STOP, which QEMU sends before it answers, says that the guest ran until then.
"""

from __future__ import annotations

import asyncio

from qemu.qmp import EventListener

from pageferry.errors import WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu.machine import Machine

_ENDED = {
    "shutdown": "the guest has shut down",
    "guest-panicked": "the guest has panicked",
    "internal-error": "the guest has failed in a way that QEMU cannot continue",
}
"""Run states from which only a reset leads to a running guest, and what they mean."""


class LastSeen:
    """What was last seen of one guest."""

    def __init__(self, name: str, machine: Machine, *, ran: bool) -> None:
        self.name = name
        self.machine = machine
        self.ran = ran
        """Whether it ran, or was about to be stopped."""
        self.status = ""
        """Run state, as in `query-status`: that of a paused guest."""
        self._interference: EventListener | None = None
        """Events of other clients that resume or reset the guest after `stop`."""

    async def stop(self, monitor: Monitor) -> bool:
        """Stop the vCPUs, and look at guest and machine; returns whether the guest ran until then.

        Raises WorkloadError if it cannot be stopped, WorkloadDied.
        """
        with monitor.events("STOP") as stopped:
            await monitor.execute("stop")
            ran = not stopped.empty()
        self._interference = monitor.listen("RESUME", "RESET")
        await self._look(monitor)
        if self.status in ("running", "suspended"):
            raise WorkloadError(
                f"cannot pause {self.name}: it is {self.status} after `stop`; wake it up, and keep other clients from "
                f"resuming it"
            )
        return ran

    def check_not_ended(self, stopped: bool) -> None:
        """Raises WorkloadError if the guest has ended since it was last seen running; once only. `stopped`: it ran."""
        ran, self.ran = self.ran, stopped
        if (how := _ENDED.get(self.status)) is not None and ran:
            raise WorkloadError(
                f"cannot pause {self.name}: {how} (run state {self.status}); it remains on this host, and a "
                "second attempt accepts this state"
            )

    async def saved(self, monitor: Monitor) -> None:
        """The device state was saved: that may have changed the run state."""
        self.status = await _status(monitor)

    async def loaded(self, monitor: Monitor, *, was_running: bool) -> None:
        """The device state was loaded. Raises WorkloadError if the guest could not run with it, or runs already."""
        await self._check_machine(monitor)
        if self.status == "running":
            raise WorkloadError(f"cannot hand over {self.name}: another client has resumed it already")
        if was_running and (how := _ENDED.get(self.status)) is not None:
            raise WorkloadError(f"cannot run {self.name} with this state: {how} (run state {self.status})")

    async def check_unchanged(self, monitor: Monitor) -> None:
        """Raises WorkloadError unless guest and machine are as they were when the state was saved or loaded."""
        before = self.status
        await self._check_machine(monitor)
        if self.status != before or (self._interference is not None and not self._interference.empty()):
            raise WorkloadError(
                f"{self.name} was resumed or reset while it was paused (run state {self.status}, before: "
                f"{before}); keep other clients from controlling it until it has been migrated"
            )

    async def _check_machine(self, monitor: Monitor) -> None:
        before = self.machine
        await self._look(monitor)
        before.check_unchanged(self.machine, self.name)

    async def _look(self, monitor: Monitor) -> None:
        self.status, self.machine = await asyncio.gather(_status(monitor), self.machine.again(monitor))


async def runs(monitor: Monitor) -> bool:
    """Whether the guest runs now."""
    return bool((await monitor.execute("query-status"))["running"])


async def _status(monitor: Monitor) -> str:
    return str((await monitor.execute("query-status"))["status"])
