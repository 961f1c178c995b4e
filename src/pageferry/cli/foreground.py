"""Guests that stay in the foreground of a command, which ends with them: those of `run`, `receive` and `restore`."""

from __future__ import annotations

import asyncio

from pageferry.workloads.qemu import QemuWorkload


async def see_to_the_end(workload: QemuWorkload) -> int | None:
    """Wait for the end of a guest, and forget it; when we are to end, it ends first."""
    try:
        code = await workload.ended()
    except asyncio.CancelledError:
        await asyncio.shield(workload.discard())
        raise
    await workload.forget()
    return code
