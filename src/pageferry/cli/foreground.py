"""Guests that run in the foreground: the command ends when the guest exits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pageferry.errors import WorkloadError
from pageferry.host.processes import signal_name

if TYPE_CHECKING:
    from pageferry.workloads.qemu.guest import QemuWorkload


async def run_in_foreground(workload: QemuWorkload, program: str) -> None:
    """Wait until the guest exits, and remove its entry from the registry. On cancellation, terminate the guest and
    remove its entry.

    Raises WorkloadError if `program`, the guest's QEMU, fails or is killed by a signal.
    """
    try:
        code = await workload.ended()
    except asyncio.CancelledError:
        await asyncio.shield(workload.discard())
        raise
    await workload.forget("exited")
    if code:
        # As in `subprocess`, the code is negative if a signal killed the process.
        how = f"exited with code {code}" if code > 0 else f"was killed by {signal_name(-code)}"
        raise WorkloadError(f"{workload.name}: {program} {how}; see its output for the cause")


async def run_all_in_foreground(workloads: Sequence[QemuWorkload], program: str) -> None:
    """Wait until all guests have exited, as `run_in_foreground` does for each. On cancellation, terminate all guests. A
    guest whose QEMU fails does not end the others.

    Raises the first error, in the order of the guests, when all of them have exited.
    """
    ended = await asyncio.gather(
        *(run_in_foreground(workload, program) for workload in workloads), return_exceptions=True
    )
    for error in ended:
        if error is not None:
            raise error
