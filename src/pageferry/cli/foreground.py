"""Guests that run in the foreground: the command ends when the guest exits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pageferry.workloads.qemu.guest import QemuWorkload


async def run_in_foreground(workload: QemuWorkload) -> int | None:
    """Wait until the guest exits, remove its entry from the registry, and return its exit code. On cancellation,
    terminate the guest and remove its entry."""
    try:
        code = await workload.ended()
    except asyncio.CancelledError:
        await asyncio.shield(workload.discard())
        raise
    await workload.forget()
    return code
