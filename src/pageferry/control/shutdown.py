"""Shutdown of guests: a guest shuts down when its power button is pressed, and its QEMU exits."""

from __future__ import annotations

import asyncio
import time
from typing import Unpack

from pageferry import values
from pageferry.control.events import StopResult
from pageferry.control.options import ShutdownArguments, ShutdownOptions
from pageferry.control.session import guest_entry, guest_session
from pageferry.control.stopping import stop_async
from pageferry.errors import ShutdownTimeout, WorkloadError
from pageferry.host import endings, processes
from pageferry.host.blocking import synchronous
from pageferry.host.registry import Folder, QemuEntry, Registry
from pageferry.migration.ownership import committed
from pageferry.workloads.qemu import run_control

_POLL = 1.0
"""Interval at which the run state is queried during a shutdown, seconds. QEMU exits when its guest has shut down,
unless it was started with -no-shutdown."""

_RELEASE_TIMEOUT = 5.0
"""Seconds to wait until a migration releases the name of the guest that it has ended."""


async def shutdown_async(name: str, **options: Unpack[ShutdownArguments]) -> StopResult:
    """Shut down a guest with its ACPI power button, and wait until its QEMU has exited.

    `options` are the fields of `pageferry.control.options.ShutdownOptions`: timeout (seconds), force. The monitor is
    not kept during the wait, so other commands can use the guest.

    Raises ShutdownTimeout if the guest has not shut down in time; it keeps running. Raises WorkloadError at once if the
    guest cannot respond, for example because it is paused. With `force`, the guest is ended in both cases, as by
    `stop`. Also raises NoSuchWorkload, UnsupportedError for workloads that are not guests, WorkloadDied.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> pageferry.shutdown("web", timeout=1, force=True).forced  # without an operating system
        True
    """
    chosen = values.options(ShutdownOptions, options)
    started, registry = time.monotonic(), Registry()
    entry, forced = guest_entry(name, "shut down", registry), False
    try:
        await _shut_down(name, entry, chosen.timeout, registry)
        registry.remove_ended(name, entry, endings.now(name, entry.kind, entry.pid, "exited", exact=True))
    except WorkloadError:
        if not chosen.force or not entry.alive:
            raise
        await stop_async(name)
        forced = True
    return StopResult(workload=name, forced=forced, duration_ms=(time.monotonic() - started) * 1e3)


shutdown = synchronous(shutdown_async)


async def _shut_down(name: str, entry: QemuEntry, timeout: float, registry: Registry) -> None:
    """Press the power button, and wait for the exit of QEMU. Raises WorkloadError, ShutdownTimeout."""
    async with guest_session(name, "shut down", registry=registry) as (_, monitor):
        pressed = await run_control.power_down(monitor, name)
    if not pressed:
        await stop_async(name)
        return
    try:
        async with asyncio.timeout(timeout):
            await _wait_for_exit(name, entry, registry)
    except TimeoutError as late:
        raise ShutdownTimeout(
            f"{name} has not shut down {timeout:g} s after the power button was pressed, and keeps running; its system "
            f"may not handle ACPI, or may need more time: increase `timeout`, or end the guest with `force` or "
            f"`pageferry stop {name}`"
        ) from late


async def _wait_for_exit(name: str, entry: QemuEntry, registry: Registry) -> None:
    """Wait until QEMU has exited, or end it when the guest has shut down. Raises WorkloadError if the guest fails, or
    has been migrated to another host."""
    ended = asyncio.ensure_future(processes.wait_for_end(entry.pid, entry.started))
    try:
        while not (await asyncio.wait({ended}, timeout=_POLL))[0]:
            state = await _run_state(name, registry)
            if run_control.has_shut_down(state):
                await stop_async(name)
            elif run_control.has_failed(state):
                raise WorkloadError(
                    f"cannot shut down {name}: the guest has failed (run state {state}); end it with `pageferry stop "
                    f"{name}`"
                )
        if await _was_migrated(Folder(registry, name)):
            raise WorkloadError(
                f"cannot shut down {name}: it was migrated, and may run at the destination; shut it down there"
            )
    finally:
        ended.cancel()


async def _was_migrated(folder: Folder) -> bool:
    """Return whether a migration has ended the QEMU of a guest: it may run at the destination."""
    deadline = time.monotonic() + _RELEASE_TIMEOUT
    while committed(folder) is not None:  # the source is about to release the name
        if time.monotonic() > deadline:
            return True
        await asyncio.sleep(0.05)
    record = endings.find(folder.registry.path, folder.name)
    return record is not None and record.cause == "migrated"


async def _run_state(name: str, registry: Registry) -> str:
    """Return the run state of a guest; an empty text if another client uses the monitor, or QEMU has exited."""
    try:
        async with guest_session(name, "shut down", timeout=_POLL, registry=registry) as (_, monitor):
            return str((await monitor.execute("query-status"))["status"])
    except WorkloadError:
        return ""
