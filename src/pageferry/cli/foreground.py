"""Guests in the foreground of a command that ends with them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pageferry.workloads.qemu.guest import QemuWorkload


async def run_in_foreground(workload: QemuWorkload) -> int | None:
    """Wait until the guest exits, remove its entry and return its exit code. On cancellation, end the guest first."""
    try:
        code = await workload.ended()
    except asyncio.CancelledError:
        await asyncio.shield(workload.discard())
        raise
    await workload.forget()
    return code
