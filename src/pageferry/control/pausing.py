"""Pausing and resuming of guests by their users.

Only the owner of a guest may run it. A source that has committed a guest, and a destination that has not decided yet,
are recognised by their records. The records are read within the session of the monitor in which the guest is resumed.
An operation that changes these records needs the same session: a source commits while it keeps the session, and a
destination resumes the guest within the session.
"""

from __future__ import annotations

from pageferry.control.events import RunStateResult
from pageferry.control.session import guest_entry, guest_session
from pageferry.errors import WorkloadError
from pageferry.host.blocking import synchronous
from pageferry.host.registry import Folder, Registry
from pageferry.migration.ownership import committed
from pageferry.workloads.qemu import awaiting, run_control


async def pause_async(name: str) -> RunStateResult:
    """Pause a guest until `resume`. A guest that is already paused stays paused.

    While another operation has paused the guest, wait up to 10 s for it. A checkpoint or a migration of a paused guest
    leaves it paused.

    Raises NoSuchWorkload, UnsupportedError for workloads that are not guests, WorkloadDied, and WorkloadError if the
    guest waits for the source of a migration, has shut down, or is used by another command.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> pageferry.pause("web").status
        'paused'
        >>> pageferry.resume("web").status
        'running'
        >>> pageferry.stop("web")
    """
    async with guest_session(name, "pause") as (folder, monitor):
        if awaiting.waits(folder) and await run_control.is_paused(monitor):
            raise WorkloadError(
                f"cannot pause {name}: it is waiting for its state and not running; retry when it is running"
            )
        changed = await run_control.pause(monitor, name)
        if changed:
            awaiting.end(folder)  # the guest ran, so it belongs to this host
    return RunStateResult(workload=name, status="paused", changed=changed)


pause = synchronous(pause_async)


async def resume_async(name: str) -> RunStateResult:
    """Resume a guest that its user has paused. A guest that is already running is not affected.

    Raises NoSuchWorkload, UnsupportedError for workloads that are not guests, WorkloadDied, and WorkloadError if the
    guest cannot be resumed, because it may be running on another host, it has shut down, or another command is using
    it.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> pageferry.resume("web").changed  # it is running
        False
        >>> pageferry.stop("web")
    """
    registry = Registry()
    guest_entry(name, "resume", registry)
    _check_committed(registry.folder(name))  # the monitor of a source that is sending pages is not free
    async with guest_session(name, "resume", registry=registry) as (folder, monitor):
        if await run_control.is_paused(monitor):
            check_owner(folder)
        changed = await run_control.resume(monitor, name)
        awaiting.end(folder)
    return RunStateResult(workload=name, status="running", changed=changed)


resume = synchronous(resume_async)


def check_owner(folder: Folder) -> None:
    """Raise WorkloadError if a paused guest may belong to another host."""
    _check_committed(folder)
    if awaiting.waits(folder):
        raise WorkloadError(
            f"cannot resume {folder.name}: it waits for its source or its image, and another host may own it; if the "
            f"command that started it has been killed, end it with `pageferry stop {folder.name}`"
        )


def _check_committed(folder: Folder) -> None:
    if committed(folder) is not None:
        raise WorkloadError(
            f"cannot resume {folder.name}: it was committed by a migration, and may run at the destination; run "
            f"`pageferry migrate {folder.name} --recover`"
        )
