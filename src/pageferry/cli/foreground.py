"""Options of the verbs that start a guest, and guests in the foreground of a command that ends with them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pageferry.workloads.qemu.guest import QemuWorkload


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestOptions:
    """Options of `run`, `receive` and `restore`."""

    detach: bool = False
    """Return when the guest runs, and write its output to a log."""
    hugetlb: bool = False
    """Place guest memory in reserved 2 MiB pages (hugetlbfs)."""


async def run_in_foreground(workload: QemuWorkload) -> int | None:
    """Wait until the guest exits, remove its entry and return its exit code. On cancellation, end the guest first."""
    try:
        code = await workload.ended()
    except asyncio.CancelledError:
        await asyncio.shield(workload.discard())
        raise
    await workload.forget()
    return code
