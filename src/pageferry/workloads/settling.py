"""Having the page tables of a workload to oneself: completing its restore, taking the trace of a checkpoint off."""

from __future__ import annotations

import asyncio

from pageferry.host.registry import Folder, Registry
from pageferry.workloads import deferred, following
from pageferry.workloads.base import Workload


async def settled(workload: Workload, *, traces: bool = True) -> None:
    """When a restore of the workload is under way, have all of it in memory, and its traps gone.

    `traces`: take off the trace that the last checkpoint left, too.

    Raises RestoreError when its pager is gone, ImageError when the image cannot be read.
    """
    folder = Folder(Registry(), workload.name)
    if deferred.is_restoring(folder):
        await asyncio.to_thread(deferred.settle, folder)
    if traces:
        await asyncio.to_thread(following.forget, workload)
