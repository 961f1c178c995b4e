"""Completing the restore of a workload before its page tables are needed for something else."""

from __future__ import annotations

import asyncio

from pageferry.host.registry import Folder, Registry
from pageferry.workloads import deferred
from pageferry.workloads.base import Workload


async def settled(workload: Workload) -> None:
    """When a restore of the workload is under way, have all of it in memory, and its traps gone.

    Raises RestoreError when its pager is gone, ImageError when the image cannot be read.
    """
    folder = Folder(Registry(), workload.name)
    if deferred.is_restoring(folder):
        await asyncio.to_thread(deferred.settle, folder)
