"""Restore of a guest that shares the memory of its image: QEMU receives the base before its device state is loaded."""

from __future__ import annotations

from pageferry.checkpoints.restore_options import GuestOptions
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder
from pageferry.pager import records
from pageferry.pager.base_client import open_base
from pageferry.pager.base_records import CloneRecord
from pageferry.pager.launcher import PagerConnection
from pageferry.workloads.qemu.guest import QemuWorkload


async def share(
    workload: QemuWorkload, pager: PagerConnection, folder: Folder, image: str, options: GuestOptions
) -> PagerConnection:
    """Replace the memory of a guest that waits for its state by private pages over the base of the opened image.

    Return the connection to the pager that serves the base: `pager`, or another one. Raises UnsupportedError for memory
    that cannot be replaced, RestoreError, CannotHandleFaults.
    """
    serving, opened = await open_base(pager, folder.registry)
    try:
        fault_point("restore.base-opened")
        work = CloneRecord(
            image=image,
            identity=opened.identity,
            pid=workload.pid,
            regions=[records.record_of(region) for region in workload.regions],
            prefetch=options.prefetch,
            eager=options.eager,
        )
        await workload.share_base(serving, opened, work)
    except BaseException:
        if serving is not pager:
            serving.close()
        raise
    return serving
