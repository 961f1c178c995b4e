"""Guests by their names: start, checkpoint and restore, as the commands of the same names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from pageferry import values
from pageferry.checkpoints import restore_guest as guests
from pageferry.checkpoints.events import CheckpointResult, RestoreResult
from pageferry.checkpoints.image_source import image_argument, local_image_async
from pageferry.checkpoints.options import CheckpointArguments, Options
from pageferry.checkpoints.restore_options import GuestArguments, GuestOptions
from pageferry.checkpoints.save import save
from pageferry.checkpoints.target import target
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import synchronous
from pageferry.host.registry import Registry
from pageferry.workloads.callbacks import check_listener
from pageferry.workloads.events import WorkloadInfo
from pageferry.workloads.inventory import describe
from pageferry.workloads.open import open_workload
from pageferry.workloads.qemu.guest import QemuWorkload


async def run_guest_async(name: str, arguments: Sequence[str], *, hugetlb: bool = False) -> WorkloadInfo:
    """Start a QEMU guest under a name, detached, and return its description.

    `arguments`: command line of QEMU, program first. `hugetlb`: place guest memory in reserved 2 MiB pages. The guest
    outlives this program; `shutdown` and `stop` end it.

    Raises UsageError, NameInUse, UnsupportedError for options that cannot be managed, WorkloadError with the message of
    QEMU.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> print(info.name, info.kind, info.status)
        web qemu running
        >>> pageferry.stop("web")
    """
    command = _command(arguments)
    workload = await QemuWorkload.start(name, command, hugetlb=values.flag("hugetlb", hugetlb))
    try:
        return await describe(workload)
    finally:
        workload.close()


run_guest = synchronous(run_guest_async)


async def checkpoint_guest_async(
    name: str,
    path: str | Path,
    *,
    parent: str | Path | None = None,
    listener: Listener = ignore,
    **options: Unpack[CheckpointArguments],
) -> CheckpointResult:
    """Save a running guest, or the named arena of another program, to an image. The workload keeps running.

    `parent`, `listener`, `options`: see `checkpoint`. Raises NoSuchWorkload, WorkloadError if another operation on the
    workload is running, and the errors of `checkpoint`.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> result = pageferry.checkpoint_guest("web", "web.img")
        >>> print(result.status, result.workload, result.memory >> 20)
        completed web 64
        >>> pageferry.stop("web")
    """
    chosen = values.options(Options, options)
    place, older = target("path", path, chosen), values.optional(image_argument, "parent", parent)
    check_listener("listener", values.function("listener", listener))
    registry = Registry()
    workload = await open_workload(name, registry=registry)
    try:
        with registry.folder(name).exclusively(f"a checkpoint to {place.name}"):
            return await save(workload, place, older, chosen, listener)
    finally:
        workload.close()


checkpoint_guest = synchronous(checkpoint_guest_async)


async def restore_guest_async(
    name: str,
    path: str | Path,
    arguments: Sequence[str],
    *,
    listener: Listener = ignore,
    **options: Unpack[GuestArguments],
) -> RestoreResult:
    """Restore a guest from an image under a name, detached, and return when the guest runs. Its memory is loaded on
    demand by a pager process that outlives this program.

    `path`: image file, or the URL of an image in a store, whose contents are fetched to the cache of this host
    when they are accessed (docs/stores.md). `arguments`: command line of QEMU, program first. `options` are the fields
    of `pageferry.checkpoints.restore_options.GuestOptions`, other than `detach`: eager, prefetch, hugetlb, memory,
    disks, paused, resume, guid, clock, and key, key_command and allow_plain for an image in a store.

    Raises ImageError, UsageError, NameInUse, RestoreError if the image does not match the command line, DisksDiffer if
    disks are not known to be unchanged, WorkloadError with the message of QEMU. After an error, no guest is left.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> result = pageferry.checkpoint_guest("web", "web.img")
        >>> pageferry.stop("web")
        >>> result = pageferry.restore_guest("web", "web.img", qemu)
        >>> pageferry.qmp("web", "query-status")["status"]
        'running'
        >>> pageferry.stop("web")
    """
    if "detach" in options:
        raise UsageError("invalid `detach`: a guest that Python restores is always detached; remove it")
    chosen = values.options(GuestOptions, options)
    check_listener("listener", values.function("listener", listener))
    command = _command(arguments)
    async with local_image_async("path", path, chosen) as image:
        workload, result = await guests.restore_guest(name, image, command, listener=listener, **options)
    workload.close()
    return result


restore_guest = synchronous(restore_guest_async)


def _command(arguments: Sequence[str]) -> Sequence[str]:
    command = values.texts("arguments", arguments)
    if not command:
        raise UsageError("invalid `arguments`: expected the command line of QEMU, not an empty list")
    return command
