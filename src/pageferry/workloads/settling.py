"""Having the page tables of a workload to oneself: completing its restore, taking the trace of a checkpoint off.

Who only puts traces on need not wait for the restore: see `holding`.
"""

from __future__ import annotations

import asyncio

from pageferry._engine import Pager
from pageferry.errors import ImageError
from pageferry.host.registry import Folder, Registry
from pageferry.workloads import deferred, following
from pageferry.workloads.base import SMALL_PAGE, Workload
from pageferry.workloads.lifecycle import LocalWorkload


async def settled(workload: Workload, *, traces: bool = True) -> None:
    """When a restore of the workload is under way, have all of it in memory, and its traps gone.

    `traces`: take off the trace that the last checkpoint left, too.

    Raises RestoreError when its pager is gone, ImageError when the image cannot be read.
    """
    if isinstance(workload, LocalWorkload) and workload.pager is not None:
        pager, length = workload.pager, workload.regions[0].length
        await asyncio.to_thread(bring_all, pager, length)
    else:
        folder = Folder(Registry(), workload.name)
        if deferred.is_restoring(folder):
            await asyncio.to_thread(deferred.settle, folder)
    if traces:
        await asyncio.to_thread(following.forget, workload)


def bring_all(pager: Pager, length: int) -> None:
    """Have all `length` bytes in memory that a pager of this process brings, and its traps gone. Raises ImageError."""
    while not pager.finished:
        try:
            pager.ensure(0, 0, length // SMALL_PAGE)
        except ValueError as error:
            raise ImageError(str(error)) from error
        pager.wait(1.0)
