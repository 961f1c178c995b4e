"""Pausing, resuming and powering off a QEMU guest on behalf of its user, in one session of its monitor.

Unlike the changes of `QemuWorkload.pause`, these outlive the command. An operation of pageferry that pauses a guest
keeps the only session of the monitor for the whole pause. A user's command that has a session therefore never
interrupts such an operation.
"""

from __future__ import annotations

import asyncio

from pageferry.errors import WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu import run_state

STOP_TIMEOUT = 60.0
"""Maximum time for QMP `stop`, which waits for the disk requests of the guest, seconds."""

_PAUSED = frozenset({"paused", "prelaunch", "io-error", "watchdog", "debug"})
"""Run states of a paused guest that QMP `cont` continues."""

_REASONS = {
    "inmigrate": "it waits for the source of a migration",
    "postmigrate": "it was migrated by QEMU, not by pageferry, and may run on another host; if it does not, QMP cont "
    "resumes it",
    "finish-migrate": "it is being migrated, and may run on another host",
    "save-vm": "QEMU is saving it; retry when that has finished",
    "restore-vm": "QEMU is loading its state; retry when that has finished",
    "colo": "it is replicated by COLO",
    "suspended": "it is suspended; wake it up with `pageferry monitor NAME system_wakeup`",
    "shutdown": "it has shut down; end it with `pageferry stop`, or reset it",
    "guest-panicked": "it has panicked; end it with `pageferry stop`, or reset it",
    "internal-error": "it has failed, and QEMU cannot continue it; end it with `pageferry stop`, or reset it",
}
"""Run states in which a guest can be neither paused nor resumed, each with its meaning and a remedy."""


async def pause(monitor: Monitor, name: str) -> bool:
    """Stop the vCPUs of a guest. Return False if the guest is already paused.

    Raises WorkloadError if its run state does not allow this, or if its disks do not respond.
    """
    state = await _state(monitor)
    if state in _PAUSED:
        return False
    if state != "running":
        raise WorkloadError(f"cannot pause {name}: {_reason(state, name)}")
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await monitor.execute("stop")
    except TimeoutError as late:
        raise WorkloadError(
            f"cannot pause {name} within {STOP_TIMEOUT:g} s: QEMU is waiting for a disk request; the guest is paused "
            "when the request completes"
        ) from late
    return True


async def resume(monitor: Monitor, name: str) -> bool:
    """Continue the vCPUs of a guest. Return False if the guest is already running. The caller has checked that this
    host owns the guest.

    Raises WorkloadError if the run state of the guest does not allow this, or if the guest does not run afterwards.
    """
    state = await _state(monitor)
    if state == "running":
        return False
    if state not in _PAUSED:
        raise WorkloadError(f"cannot resume {name}: {_reason(state, name)}")
    try:
        await monitor.execute("cont")
    except WorkloadError as refused:  # for example, another process holds a lock on a disk
        raise type(refused)(f"cannot resume {name}: {refused}") from refused
    if not await run_state.runs(monitor):
        raise WorkloadError(
            f"cannot resume {name}: its run state after `cont` is {await _state(monitor)}; see `pageferry logs`"
        )
    return True


async def is_paused(monitor: Monitor) -> bool:
    """Return whether a guest is paused in a run state that QMP `cont` continues."""
    return await _state(monitor) in _PAUSED


async def power_down(monitor: Monitor, name: str) -> bool:
    """Press the power button of a guest (ACPI). Return False if the guest has already shut down.

    Raises WorkloadError if the guest cannot react, because it is not running.
    """
    state = await _state(monitor)
    if has_shut_down(state):
        return False
    if state != "running":
        why = "it is paused; run `pageferry resume` first" if state in _PAUSED else _reason(state, name)
        raise WorkloadError(f"cannot shut down {name}: {why}")
    await monitor.execute("system_powerdown")
    return True


def has_shut_down(state: str) -> bool:
    """Return whether a guest in this run state has shut down, and its QEMU was started with -no-shutdown."""
    return state == "shutdown"


def has_failed(state: str) -> bool:
    """Return whether a guest in this run state cannot react to the power button any longer."""
    return state in ("guest-panicked", "internal-error")


async def _state(monitor: Monitor) -> str:
    return str((await monitor.execute("query-status"))["status"])


def _reason(state: str, name: str) -> str:
    return _REASONS.get(state, f"its run state is {state}").replace("NAME", name)
