"""Last known run state and machine of a QEMU guest, and detection of changes by other clients.

QMP `stop` has no effect on a guest that does not run: it may have shut down, panicked, or been paused by another client
since the last check. Only the event STOP, which QEMU sends before the reply to `stop`, shows that the guest was
running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from qemu.qmp import EventListener

from pageferry.errors import WorkloadError
from pageferry.host.qmp import Monitor, event_time
from pageferry.workloads.qemu.machine import Machine

_ENDED = {
    "shutdown": "the guest has shut down",
    "guest-panicked": "the guest has panicked",
    "internal-error": "the guest has failed, and QEMU cannot continue it",
}
"""Run states that a guest can leave only by a reset, each with its meaning."""

_RUNS_OR_WAITS = frozenset({"running", "inmigrate"})
"""Run states of a guest that runs, or waits for the source of a migration."""

_PAUSED_BY_USER = frozenset({"paused", "prelaunch"})
"""Run states of a guest that was paused by QMP `stop`, or started with -S."""

_WRITES_DEVICES = "device"
"""Status of QEMU's migration from `migrate-continue` on."""

MIGRATED = "postmigrate"
"""Run state of a QEMU whose own migration has completed."""


def reason(state: str) -> str | None:
    """Return the reason why a guest in this run state is paused; None if the guest runs, or was paused by its user."""
    if state == MIGRATED:
        return "migrated by QEMU, not by pageferry: it may run on another host; if it does not, QMP cont resumes it"
    return None if state in _RUNS_OR_WAITS | _PAUSED_BY_USER else f"QEMU state {state}"


FINISHING = "finish-migrate"
"""Run state of a guest that QEMU's own migration has stopped, until the migration has completed."""


class Stopped(NamedTuple):
    """Result of stopping the vCPUs of a guest."""

    ran: bool
    """Whether the guest was running."""
    status: str | None = None
    """Run state, if it is known; None if it has to be queried."""
    at: float = 0.0
    """Time at which QEMU stopped the vCPUs, on the clock of `time.perf_counter`; 0 if the guest was not running."""


Stop = Callable[[Monitor], Awaitable[Stopped]]
"""Function that stops the vCPUs of a guest."""


class LastSeen:
    """Last known run state and machine of one guest."""

    def __init__(self, name: str, machine: Machine, *, ran: bool) -> None:
        self.name = name
        self.machine = machine
        self.ran = ran
        """Whether the guest was running at the last check, or until the last `stop`."""
        self.stopped_at = 0.0
        """Time of the last `stop`, as in `Stopped`."""
        self.status = ""
        """Run state of the paused guest, as in `query-status`."""
        self._events: EventListener | None = None
        """Events since `stop` that can show a resume or a reset of the guest."""
        self._resumed = False
        """Whether the guest was resumed after `stop`."""
        self._reset = False
        """Whether the guest was reset after QEMU began to write the devices."""
        self._looking: asyncio.Future[Machine] | None = None
        """Description of the machine that is being read; None if `look` was not called since the last check."""

    async def stop(self, monitor: Monitor, stop: Stop) -> bool:
        """Stop the vCPUs, and read the run state. Return whether the guest was running.

        Raises WorkloadError if the guest cannot be stopped, WorkloadDied if QEMU exits.
        """
        ran, status, self.stopped_at = await stop(monitor)
        self._events = monitor.listen("RESUME", "RESET", "MIGRATION")
        self._resumed = self._reset = False
        self.status = await _status(monitor) if status is None else status
        if self.status in ("running", "suspended"):
            raise WorkloadError(
                f"cannot pause {self.name}: it is {self.status} after `stop`; wake it up, and keep other clients from "
                f"resuming it"
            )
        return ran

    def check_not_ended(self, stopped: bool) -> None:
        """Raise WorkloadError, once only, if the guest has shut down or failed since it last ran. `stopped`: whether
        the guest was running until `stop`."""
        ran, self.ran = self.ran, stopped
        if (how := _ENDED.get(self.status)) is not None and ran:
            raise WorkloadError(
                f"cannot pause {self.name}: {how} (run state {self.status}); it remains on this host, and a "
                "second attempt accepts this state"
            )

    def look(self, monitor: Monitor, *, media: bool = False) -> None:
        """Start to read the description of the machine, while this process does other work. Each read takes about 1 ms,
        for which a paused guest need not wait. `media`: read the block devices too."""
        self._looking = asyncio.ensure_future(self.machine.again(monitor, media=media))
        self._looking.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def machine_changed(self) -> bool:
        """Wait until `look` has completed, and update the machine. Return whether it differs from the last one. Raises
        WorkloadError, WorkloadDied."""
        if self._looking is None:
            return False
        looking, self._looking = self._looking, None
        before, self.machine = self.machine, await looking
        return before != self.machine

    async def saved(self, monitor: Monitor) -> None:
        """Update the run state, which saving the device state may have changed."""
        self.status = await _status(monitor)

    async def loaded(self, monitor: Monitor, *, was_running: bool) -> None:
        """Update the run state after a device state was loaded, and start to read the machine. Raises WorkloadError if
        the guest is already running, or if it could not run with this state."""
        self.status = await _status(monitor)
        if self.status == "running":
            raise WorkloadError(
                f"cannot hand over {self.name}: another client has resumed it; keep other clients from controlling it"
            )
        if was_running:
            self.check_can_run()
        self.look(monitor, media=True)  # for the check before the guest runs

    def check_can_run(self) -> None:
        """Raise WorkloadError if the guest has shut down or failed, so that it cannot run with this state."""
        if (how := _ENDED.get(self.status)) is not None:
            raise WorkloadError(f"cannot run {self.name} with this state: {how} (run state {self.status})")

    async def check_unchanged(self, monitor: Monitor) -> None:
        """Raise WorkloadError if the guest was resumed or reset since the state was saved or loaded."""
        before, self.status = self.status, await _status(monitor)
        self._read_events()
        if self.status != before or self._resumed or self._reset:
            raise WorkloadError(
                f"cannot hand over {self.name}: another client has resumed or reset it during the pause (run state "
                f"{self.status}, {before} before); keep other clients from controlling it until the operation has "
                "finished"
            )

    async def check_machine(self) -> None:
        """Raise WorkloadError if the last `look` has found a changed machine."""
        before = self.machine
        if await self.machine_changed():
            before.check_unchanged(self.machine, self.name)

    def _read_events(self) -> None:
        """Update `_resumed` and `_reset`. A reset that was requested while the guest ran can be executed after the
        stop. It does no harm before QEMU writes the devices, because the last pages are collected later."""
        events: Any = self._events.clear() if self._events is not None else ()
        for event in events:
            match event["event"]:
                case "MIGRATION":
                    if event["data"]["status"] == _WRITES_DEVICES:
                        self._reset = False
                case "RESUME":
                    self._resumed = True
                case _:
                    self._reset = True

    async def update_media(self, monitor: Monitor) -> None:
        """Update the block devices, whose media other clients can change. A guest that is known to have none is not
        queried."""
        if self.machine.block_devices != ():
            self.machine = await self.machine.with_all_media(monitor)


async def stop(monitor: Monitor) -> Stopped:
    """Stop the vCPUs (QMP `stop`)."""
    with monitor.events("STOP") as stopped:
        await monitor.execute("stop")
        return Stopped(False) if stopped.empty() else Stopped(True, at=event_time(await stopped.get()))


async def runs(monitor: Monitor) -> bool:
    """Return whether the guest runs now."""
    return bool((await monitor.execute("query-status"))["running"])


async def _status(monitor: Monitor) -> str:
    return str((await monitor.execute("query-status"))["status"])
