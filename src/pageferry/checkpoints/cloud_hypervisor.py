"""Checkpoint of a VM of Cloud Hypervisor (S4): opening the VM, and the end of its migration after the image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from pageferry import values
from pageferry.checkpoints.events import CheckpointResult
from pageferry.checkpoints.image_source import image_argument
from pageferry.checkpoints.options import CheckpointArguments, Options
from pageferry.checkpoints.save import save
from pageferry.checkpoints.target import Target, target
from pageferry.errors import UsageError, WorkloadError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import synchronous
from pageferry.workloads.callbacks import check_listener

if TYPE_CHECKING:
    from pageferry.workloads.cloud_hypervisor.vm import CloudHypervisorVm


async def checkpoint_cloud_hypervisor_async(
    api_socket: str | Path,
    path: str | Path,
    *,
    preserve_source: bool = False,
    parent: str | Path | None = None,
    listener: Listener = ignore,
    **options: Unpack[CheckpointArguments],
) -> CheckpointResult:
    """Save a VM of Cloud Hypervisor to an image, for `serve` with `cloud_hypervisor`. The image appears at `path`, a
    file or a URL in a store, when it is complete.

    `api_socket`: path of the API socket (--api-socket). The memory of the VM must be shared (`--memory shared=on`).
    With `preserve_source`, the VM keeps running while its memory is saved; a paused VM stays paused. Otherwise the VM
    is paused until the image is complete, and Cloud Hypervisor then ends the VM. `parent` and the options are those of
    `checkpoint`, except `track` and `disks`: a write trace is not left, and disks are not saved.

    Raises CheckpointError if no image was written, UnsupportedError if the memory of the VM is not shared, WorkloadDied
    if Cloud Hypervisor exits, WorkloadError, UsageError, ImageError. After an error, the VM runs if it ran before.

    Examples:
        >>> import pageferry
        >>> pageferry.checkpoint_cloud_hypervisor("no.sock", "vm.img")  # there is no Cloud Hypervisor
        Traceback (most recent call last):
        pageferry.errors.WorkloadDied: ...
    """
    chosen = values.options(Options, options)
    socket, place = values.path("api_socket", api_socket), target("path", path, chosen)
    older = values.optional(image_argument, "parent", parent)
    preserve = values.flag("preserve_source", preserve_source)
    check_listener("listener", values.function("listener", listener))
    return await save_vm(socket, place, preserve, older, chosen, listener)


checkpoint_cloud_hypervisor = synchronous(checkpoint_cloud_hypervisor_async)


async def save_vm(
    api_socket: Path, place: Target, preserve: bool, parent: str | Path | None, options: Options, listener: Listener
) -> CheckpointResult:
    """Save a VM as `checkpoint_cloud_hypervisor_async` does, with arguments that have been checked."""
    from pageferry.workloads.cloud_hypervisor.vm import CloudHypervisorVm  # other checkpoints do not need it

    if options.track:
        raise UsageError("cannot use `track` for a VM of Cloud Hypervisor: no write trace is left in it; omit `track`")
    if options.disks.word != "record":
        raise UsageError("cannot use `disks` for a VM of Cloud Hypervisor: its disks are not saved; omit `disks`")
    options = replace(options, track=False, mode=options.mode if preserve else "stop")
    vm = await CloudHypervisorVm.open(api_socket, preserve=preserve)
    try:
        result = await save(vm, place, parent, options, listener)
        if not preserve:
            await _complete(vm, place)
        return result
    finally:
        vm.close()


async def _complete(vm: CloudHypervisorVm, place: Target) -> None:
    """Make Cloud Hypervisor end the VM, whose image is complete. Raises WorkloadError."""
    try:
        await vm.complete()
    except WorkloadError as error:
        raise type(error)(
            f"{error}; the image {place.name} is complete, but the VM may run again: delete the image unless Cloud "
            "Hypervisor has exited"
        ) from error
