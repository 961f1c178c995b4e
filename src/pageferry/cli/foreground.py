"""Guests that run in the foreground: the command ends when the guest exits."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

from pageferry.errors import WorkloadError

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
    await workload.forget()
    if code:
        raise WorkloadError(f"{workload.name}: {program} {_end(code)}; see its output for the cause")


def _end(code: int) -> str:
    """Describe a non-zero exit code as in `subprocess`: it is negative if a signal killed the process."""
    if code > 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
