"""Pausing and resuming the vCPUs of a QEMU guest, with a guardian that resumes them if this process exits."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.host.qmp import Monitor
from pageferry.workloads.direct_io import DRAIN_TIMEOUT, PAUSE_TIMEOUT
from pageferry.workloads.qemu import direct_io, disks, run_state, unsupported
from pageferry.workloads.qemu.control import QemuControl
from pageferry.workloads.qemu.run_state import LastSeen

_RECENT = 0.05
"""Seconds for which `pause` relies on the checks of `prepare`, unless the machine has changed after these checks. Open
files are always checked again."""

_FINISH_TIMEOUT = 10.0
"""Maximum time until the thread of a cancelled migration has ended, seconds. Until then, QEMU rejects `cont`."""
_FINISH_POLL = 0.002

log = logging.getLogger(__name__)

T = TypeVar("T")


class Vcpus:
    """vCPUs of one guest. `last_words`: function that returns the end of QEMU's log, for error messages."""

    def __init__(self, pid: int, control: QemuControl, seen: LastSeen, last_words: Callable[[], str]) -> None:
        self.name = seen.name
        self.pid = pid
        self._control = control
        self._seen = seen
        self._last_words = last_words
        self._prepared = -math.inf
        """Time of the last `prepare`."""

    async def prepare(self) -> None:
        """Check devices, open the monitor, start the guardian, and set up QEMU's migration for the device state."""
        monitor = await self._control.hold()
        self._control.start_guardian()
        known = self._control.prepared
        # Devices may have been added since the last check.
        status, _ = await asyncio.gather(self._control.note_status(monitor), unsupported.refuse_running(monitor))
        if status == run_state.MIGRATED and not known:
            log.warning("%s: %s", self.name, run_state.reason(status))
        self._seen.ran = self._seen.ran or not self._control.stays_paused
        await self._control.prepare_state(monitor)
        self._prepared = time.monotonic()

    async def pause(self, stop: run_state.Stop = run_state.stop) -> None:
        """Stop the vCPUs, and determine the run state. The machine is not read again. `stop`: function that
        stops the vCPUs (default: QMP `stop`).

        If another client has already paused the guest, `resume` leaves it paused. Until `commit`, a guardian resumes
        the guest if this process exits.

        Raises WorkloadError if the guest has shut down since the last check and cannot run without a reset.
        """
        if time.monotonic() - self._prepared > _RECENT:
            await self.prepare()
        monitor = await self._control.hold()
        self._control.plan_to_restore()
        ran = await self._bounded(self._seen.stop(monitor, stop), PAUSE_TIMEOUT)
        self._control.stays_paused = not ran
        self._control.plan_to_restore()
        self._seen.check_not_ended(ran)
        direct_io.refuse_pinning(self.pid, self.name)  # a device may have been added

    async def check_machine(self) -> None:
        """Determine the machine again, and check devices that were added. Raises UnsupportedError, WorkloadError."""
        async with self._control.session() as monitor:
            self._seen.look(monitor)
            if await self._seen.machine_changed():
                await unsupported.refuse_running(monitor)

    async def drain(self) -> float | None:
        """Wait for the disk requests that write to guest memory directly, in a short pause (`stop`, `cont`). Return the
        duration of the pause, seconds, or None if QEMU does no direct I/O.

        `stop` is the only command of QEMU that is documented to wait for all requests. A guardian resumes the guest if
        this process exits during the pause.
        """
        files = await in_thread(direct_io.direct_files, self.pid, self.name)
        if not files:
            return None  # avoid opening the monitor in each round; `pause` checks the devices
        async with self._control.session() as monitor:
            await unsupported.refuse_running(monitor)
            if not (await monitor.execute("query-status"))["running"]:
                return 0.0
            await direct_io.await_requests(self.pid, files, self.name)
            return await self._complete(self._stop_briefly(monitor))

    async def resume(self) -> None:
        """Resume the vCPUs (QMP `cont`), unless the guest was already paused before `pause`. It may be called after
        `save_state`.

        Raises WorkloadError if the guest does not run afterwards; WorkloadDied, with `never_ran` if QEMU cannot have
        received `cont`.
        """
        if self._control.given_up:
            log.warning("%s: paused until its disks respond; a guardian process will then resume it", self.name)
            return
        monitor = await self._control.hold()
        if monitor.hung_up:  # `cont` was not sent, and no other client can send it
            raise WorkloadDied(
                f"{self.name} (process {self.pid}) exited before it ran{self._last_words()}", never_ran=True
            )
        self._control.plan_to_restore()
        if not self._control.stays_paused:
            await self._continue(monitor)
        elif self._control.disks_released:
            await self._lock_disks(monitor)
        self._control.settle(monitor)

    async def _stop_briefly(self, monitor: Monitor) -> float:
        """Stop the guest, and continue it unless another client had paused it. Return the duration of the pause,
        seconds."""
        self._control.start_guardian()
        self._control.plan([{"execute": "cont"}, *self._control.undo])
        started, ran = time.perf_counter(), True
        try:
            with monitor.events("STOP") as stopped:
                await self._bounded(monitor.execute("stop"), DRAIN_TIMEOUT)
                ran = not stopped.empty()
        finally:
            if not self._control.given_up:
                if ran:
                    await self._continue(monitor)
                self._control.plan(self._control.undo)
        return time.perf_counter() - started

    async def _bounded(self, stopping: Coroutine[Any, Any, T], timeout: float) -> T:
        """Limit the time of a call that waits for all disk requests of the guest (QMP `stop`). After a timeout, give up
        control of the guest, because QEMU cannot cancel the call, and raise WorkloadError."""
        try:
            async with asyncio.timeout(timeout):
                return await stopping
        except TimeoutError as late:
            self._control.give_up()
            files = await in_thread(direct_io.direct_files, self.pid, self.name)
            slow = ", ".join(sorted(set(files.values()))) or "its disks"
            cause = direct_io.slow(self.name, slow, timeout)
            raise WorkloadError(f"{cause}; the guest is paused when the request completes") from late

    async def _complete(self, work: Coroutine[Any, Any, float]) -> float:
        """Return the result of `work`. A cancellation takes effect only after `work` has completed, because `work`
        resumes the guest."""
        task = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait((task,))
            raise

    async def _continue(self, monitor: Monitor) -> None:
        with monitor.events("RESUME") as resumed:
            await self._send_cont(monitor)
            # The event precedes the reply; if it is missing, the run state has to be queried.
            if not resumed.empty():
                return
        status = await monitor.execute("query-status")
        if not status["running"]:
            raise WorkloadError(
                f"cannot resume {self.name}: its run state after `cont` is {status['status']}; see `pageferry logs`"
            )

    async def _send_cont(self, monitor: Monitor) -> None:
        deadline = time.monotonic() + _FINISH_TIMEOUT
        while True:
            if await self._is_continued(monitor, deadline):
                return
            await asyncio.sleep(_FINISH_POLL)

    async def _is_continued(self, monitor: Monitor, deadline: float) -> bool:
        """Send `cont`. Return False if QEMU rejects the command because the thread of a cancelled migration has not
        ended, unless `deadline` has passed."""
        try:
            await monitor.execute("cont")
        except WorkloadDied as died:
            never_ran = await monitor.left_unread()
            raise WorkloadDied(
                f"{self.name} (process {self.pid}): {died}{self._last_words()}", never_ran=never_ran
            ) from died
        except WorkloadError as refused:  # for example, another process holds a lock on a disk
            status = await monitor.execute("query-status")
            if status["status"] == run_state.FINISHING and time.monotonic() < deadline:
                return False
            if not status["running"]:  # the end of that thread resumes the guest as well
                refused.never_ran = True
                raise
        return True

    async def _lock_disks(self, monitor: Monitor) -> None:
        try:
            await disks.lock(monitor)
        except WorkloadDied:
            raise
        except WorkloadError as failed:
            log.warning("%s: its disks are not locked while it is paused: %s", self.name, failed)
