"""Having the page tables of a workload to oneself: completing its restore, taking the trace of a checkpoint off.

Who only puts traces on need not wait for the restore: see `holding`.
"""

from __future__ import annotations

from pageferry._engine import Pager
from pageferry.errors import ImageError, RestoreError
from pageferry.host.blocking import in_thread
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import client, records
from pageferry.workloads import following
from pageferry.workloads.folders import folder_of
from pageferry.workloads.lifecycle import LocalWorkload
from pageferry.workloads.protocols import Workload


async def settled(workload: Workload, *, traces: bool = True) -> None:
    """When a restore of the workload is under way, have all of it in memory, and its traps gone.

    `traces`: take off the trace that the last checkpoint left, too.

    Raises RestoreError when its pager is gone, ImageError when the image cannot be read.
    """
    if isinstance(workload, LocalWorkload) and workload.pager is not None:
        pager, length = workload.pager, workload.regions[0].length
        await in_thread(bring_all, pager, length)
    else:
        folder = folder_of(workload)
        if folder is not None and records.is_restoring(folder):
            await in_thread(client.wait_complete, folder)
    if traces:
        await in_thread(following.forget, workload)


def bring(pager: Pager, first: int, count: int, origin: str = "") -> None:
    """Have `count` pages in memory that a pager of this process brings; `origin`: where from, for people.

    Raises ImageError for a damaged one, RestoreError where there is nobody to bring it any more.
    """
    told = f"{origin}: " if origin else ""
    try:
        pager.ensure(0, first, count)
    except ValueError as error:
        raise ImageError(f"{told}{error}") from error
    except OSError as error:
        raise RestoreError(f"{told}{error}") from error


def bring_all(pager: Pager, length: int, origin: str = "") -> None:
    """Have all `length` bytes in memory, and the pager's traps gone. Raises as `bring`."""
    while not pager.finished:
        bring(pager, 0, length // SMALL_PAGE, origin)
        pager.wait(1.0)
