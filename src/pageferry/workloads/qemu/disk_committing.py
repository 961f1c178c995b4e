"""Write-back of overlays: while the guest runs, their contents are written to the files that a checkpoint has frozen.

`block-commit` of the active overlay copies its contents to the lowest frozen file of the chain, and then mirrors all
writes to it. `job-complete` ends the job, and the guest again uses this file, which its command line names. The file
becomes writable again, and the overlays are removed.

The job changes a frozen file. It is therefore refused while an image or another overlay needs the file. If the command
is killed, the guest is not affected: the job continues in QEMU, and the next call completes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread, to_the_end
from pageferry.host.fault_points import fault_point
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu import block_devices, block_jobs, disk_files, frozen_files
from pageferry.workloads.qemu.block_devices import BlockDevice, Layer
from pageferry.workloads.qemu.block_jobs import Progress
from pageferry.workloads.qemu.disk_freezing import discard_overlay, remove_unused
from pageferry.workloads.qemu.disk_saving import SavingGuest, deletion, path_of

_OVERLAY = re.compile(r"pageferry-[0-9a-f]{8}-\d+")
"""Names of block nodes of overlays. QEMU refuses to close those that are in use."""


class Committed(NamedTuple):
    """Disk to whose file the overlays were written back."""

    name: str
    path: Path
    """File that the guest uses again."""
    removed: list[Path]
    """Overlays that were removed."""


class _Chain(NamedTuple):
    """Overlays of one disk over a frozen file."""

    disk: BlockDevice
    base: Path
    """Lowest frozen file of the chain."""
    frozen: list[Path]
    """Frozen files of the chain, the base last."""
    overlays: list[Path]
    """Files above the base."""
    arguments: dict[str, Any]
    """Arguments of `block-commit`."""
    nodes: list[str]
    """Block nodes of the overlays."""


async def commit(guest: SavingGuest, progress: Progress, *, force: bool) -> tuple[list[Committed], list[Path]]:
    """Write back all overlays of a guest. Return the disks, and the files of unused overlays that were removed.

    `force`: write them back even if images need the frozen files. Those images can then no longer be restored. Raises
    WorkloadError if images or overlays need a frozen file, or with QEMU's message.
    """
    disks = [disk for disk in guest.storage.record(guest.devices()).media if not disk.read_only]
    async with guest.control.session() as monitor:
        nodes = await monitor.execute("query-named-block-nodes", flat=True)
        ended = await _dismiss_concluded(monitor)
        for node in nodes:
            if _OVERLAY.fullmatch(node["node-name"]):
                await _try(monitor, node["node-name"])
    chains = [chain for disk in disks if (chain := await in_thread(_chain, guest.pid, disk, nodes)) is not None]
    for chain in chains:
        await in_thread(_check_needs, guest.name, chain, force)
    committed = await _commit(guest, chains, progress) if chains else []
    removed: list[Path] = []
    for disk in disks:
        removed += await in_thread(_remove_left_over, path_of(disk.layers[0], guest.pid), guest.storage.paths(), ended)
    return committed, removed


async def _commit(guest: SavingGuest, chains: Sequence[_Chain], progress: Progress) -> list[Committed]:
    jobs = {_job(chain): chain.arguments for chain in chains}
    for chain in chains:
        await in_thread(frozen_files.unseal, chain.base)
    fault_point("disks.commit")
    try:
        await block_jobs.commit(guest.control, jobs, progress)
    except WorkloadDied:
        for chain in chains:
            await in_thread(frozen_files.seal, chain.base)
        raise
    except BaseException:
        await to_the_end(_finish_all(guest, chains))
        raise
    fault_point("disks.committed")
    return await to_the_end(_finish_all(guest, chains))


async def _finish_all(guest: SavingGuest, chains: Sequence[_Chain]) -> list[Committed]:
    """Finish the disks that use their base images again, and make the base images of all others read-only. All jobs
    have concluded."""
    async with guest.control.session() as monitor:
        current = block_devices.parse(await monitor.execute("query-block"))
        layers = {one.id: {layer.path for layer in one.layers} for one in current}
        committed = []
        for chain in chains:
            if chain.disk.layers[0].path in layers.get(chain.disk.id, {chain.disk.layers[0].path}):
                await in_thread(frozen_files.seal, chain.base)
                continue
            for node in chain.nodes:
                await _try(monitor, node)
            committed.append(await in_thread(_finish, chain))
    # Done last: until then, the jobs show that the overlays are not needed.
    await block_jobs.dismiss(guest.control, list(map(_job, chains)))
    return committed


def _chain(pid: int, disk: BlockDevice, nodes: Sequence[Mapping[str, Any]]) -> _Chain | None:
    """Return the overlays of a disk; None if it has none over a frozen file."""
    files, count = [path_of(layer, pid) for layer in disk.layers], 0
    while count + 1 < len(files) and frozen_files.find(files[count + 1]) is not None:
        count += 1
    if not count:
        return None
    paths = files[: count + 1]
    names = [_node_of(nodes, layer) for layer in disk.layers[: count + 1]]
    base = {"base-node": names[-1]} if names[-1] else {"base": disk.layers[count].path}
    overlays = [name for name in names[:-1] if name]
    return _Chain(disk, paths[-1], paths[1:], paths[:-1], {"device": disk.node, **base}, overlays)


def _job(chain: _Chain) -> str:
    return block_jobs.commit_id(chain.overlays[0])


def _node_of(nodes: Sequence[Mapping[str, Any]], layer: Layer) -> str:
    """Return the block node of an image; empty if there is not exactly one."""
    found = [
        node["node-name"]
        for node in nodes
        if node["drv"] == layer.format and block_devices.location(node["file"])[0] == layer.path
    ]
    return found[0] if len(found) == 1 else ""


def _check_needs(name: str, chain: _Chain, force: bool) -> None:
    own = {str(path) for path in chain.overlays}
    for path in chain.frozen:
        record = frozen_files.find(path)
        needs = [need for need in (record.existing if record is not None else ()) if need.path not in own]
        overlays = [need for need in needs if need.kind == "overlay"]
        if overlays or (needs and not force):
            advice = (
                "end the guests that use these overlays, and remove the files"
                if overlays
                else "delete the images with `pageferry image delete`, or use --force (in Python force=True), after "
                "which they cannot be restored"
            )
            raise WorkloadError(
                f"cannot write back disk {chain.disk.shown} of {name}: {', '.join(map(str, overlays or needs))} need"
                f"{'s' if len(overlays or needs) == 1 else ''} {path}; {advice}"
            )


def _finish(chain: _Chain) -> Committed:
    """Make the base writable again, and remove the overlays."""
    for overlay in chain.overlays:
        overlay.unlink(missing_ok=True)
        frozen_files.record_path(overlay).unlink(missing_ok=True)
    frozen_files.thaw(chain.base)
    return Committed(chain.disk.shown, chain.base, chain.overlays)


def _remove_left_over(file: Path, in_use: frozenset[str], ended: bool) -> list[Path]:
    """Remove overlays of a file that the guest itself writes to: they were never used or, if jobs have `ended`, were
    written back."""
    removed = remove_unused(file, in_use)
    record = frozen_files.find(file) if ended else None
    for need in record.needs if record is not None else ():
        if need.prepared and need.path not in in_use and not (need.doubt or disk_files.is_locked(need.path)):
            discard_overlay(file, Path(need.path))
            removed.append(Path(need.path))
    if removed and (record := frozen_files.find(file)) is not None and not record.existing:
        frozen_files.thaw(file)
    return removed


async def _dismiss_concluded(monitor: Monitor) -> bool:
    """Dismiss the jobs of an earlier command that was killed after they had ended. Return whether any succeeded."""
    ended = False
    for job in await monitor.execute("query-jobs"):
        if job["id"].startswith(block_jobs.COMMIT) and job["status"] == "concluded":
            await monitor.run(block_jobs.dismissal(job["id"]))
            ended = ended or "error" not in job
    return ended


async def _try(monitor: Monitor, node: str) -> None:
    try:
        await monitor.run(deletion(node))
    except WorkloadError:  # in use, or closed by QEMU together with its parent
        return
