"""Disks that were saved with images: write overlays back to these disks, and delete images together with the copies of
disks that no other image needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

from pageferry import values
from pageferry.control.events import CommittedDisk, DisksCommitted, ImageDeleted, KeptFile
from pageferry.control.options import CommitArguments, CommitOptions
from pageferry.control.session import guest_entry
from pageferry.errors import ImageError, WorkloadError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import synchronous
from pageferry.host.registry import Registry
from pageferry.images.image import Link, open_link
from pageferry.images.working_set import path_of
from pageferry.workloads.events import DisksProgress
from pageferry.workloads.qemu import block_devices, frozen_files
from pageferry.workloads.qemu.block_devices import BlockDevice
from pageferry.workloads.qemu.guest import QemuWorkload

MAX_SIBLINGS = 10_000
"""Maximum number of files in the directory of an image that are examined for its children."""


async def commit_disks_async(
    name: str, *, listener: Listener = ignore, **options: Unpack[CommitArguments]
) -> DisksCommitted:
    """Write the overlays of a running guest back to the disks that `checkpoint` has frozen, and remove the overlays.

    The guest keeps running, and afterwards uses the disks of its command line. Overlays that a killed checkpoint has
    left are also removed. `options` are the fields of `pageferry.control.options.CommitOptions`: force (write to disks
    even if images need them; these images can then no longer be restored). `listener` is called with events of the
    progress.

    Raises NoSuchWorkload, UnsupportedError for workloads that are not guests, WorkloadDied, and WorkloadError if images
    or overlays of other guests need a disk. The guest then keeps its overlays.

    Examples:
        >>> from pathlib import Path
        >>> import pageferry
        >>> length = Path("disk.img").write_bytes(bytes(1 << 20))
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> qemu += ["-drive", "file=disk.img,format=raw,if=virtio"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> result = pageferry.checkpoint_guest("web", "web.img", disks="snapshot")
        >>> result = pageferry.delete_image("web.img")
        >>> len(pageferry.commit_disks("web").disks)
        1
        >>> pageferry.stop("web")
    """
    chosen = values.options(CommitOptions, options)
    values.function("listener", listener)
    registry = Registry()
    guest_entry(name, "commit the disks of", registry)

    def report(done: int, total: int) -> None:
        listener(DisksProgress(workload=name, done=done, total=total))

    with registry.folder(name).exclusively("a commit of disks"):
        workload = await QemuWorkload.attach(name, registry=registry)
        try:
            committed, removed = await workload.commit_disks(report, force=chosen.force)
        finally:
            workload.close()
    if not committed and not removed:
        raise WorkloadError(f"cannot write back the disks of {name}: no disk is an overlay over a frozen file")
    disks = [CommittedDisk(one.name, str(one.path), [str(path) for path in one.removed]) for one in committed]
    return DisksCommitted(workload=name, disks=disks, removed=[str(path) for path in removed])


commit_disks = synchronous(commit_disks_async)


def delete_image(path: str | Path) -> ImageDeleted:
    """Delete an image, and copies of disks that no other image and no overlay needs. Frozen disks are kept; they become
    writable again if nothing else needs them.

    Raises ImageError if the image cannot be opened or deleted, or is the parent of another image; no copy of a disk is
    deleted in these cases.
    """
    target = values.path("path", path).absolute()
    link = open_link(target)
    if children := _children(link):
        raise ImageError(
            f"cannot delete {target}: {', '.join(map(str, children))} need"
            f"{'s' if len(children) == 1 else ''} it as a parent; flatten or delete them first"
        )
    try:
        record = block_devices.decode(link.metadata.details)
    except WorkloadError as wrong:
        raise ImageError(f"cannot delete {target}: {wrong}") from wrong
    try:
        target.unlink()
        path_of(target).unlink(missing_ok=True)
    except OSError as error:
        raise ImageError(f"cannot delete {target}: {error.strerror}") from error
    removed: list[str] = []
    kept: list[KeptFile] = []
    for disk in record.saved if record is not None else ():
        for layer in disk.saved:
            _release(disk, Path(layer.path), target, removed, kept)
    return ImageDeleted(image=str(target), removed=removed, kept=kept)


def _release(disk: BlockDevice, path: Path, image: Path, removed: list[str], kept: list[KeptFile]) -> None:
    """Remove a deleted image from the record of a file that it needed. If the file is a copy that nothing else needs,
    remove it."""
    try:
        if (record := frozen_files.find(path)) is None:
            return
        others = record.existing
        if others or disk.frozen:
            gone = [need for need in record.needs if need.path == str(image) and need not in others]
            frozen_files.release(path, *gone)
            kept.append(KeptFile(str(path), [str(need) for need in others]))
            return
        path.unlink()
        frozen_files.record_path(path).unlink(missing_ok=True)
        removed.append(str(path))
    except (OSError, WorkloadError) as error:
        kept.append(KeptFile(str(path), [f"cannot be removed: {error}"]))


def _children(link: Link) -> list[Path]:
    """Return the images in the directory of an image that have it as their parent."""
    found = []
    for number, entry in enumerate(os.scandir(link.path.parent)):
        if number >= MAX_SIBLINGS or not entry.is_file(follow_symlinks=False) or entry.path == str(link.path):
            continue
        try:
            parent = open_link(Path(entry.path)).metadata.parent
        except ImageError:
            continue
        if parent is not None and parent.id == link.identity.id:
            found.append(Path(entry.path))
    return sorted(found)
