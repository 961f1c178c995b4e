"""Service for virtual machine monitors that load their memory from an image."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from pageferry import values
from pageferry.checkpoints.image_source import image_argument, local_image_async
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.host.blocking import in_thread, synchronous
from pageferry.images.image import ImageFile
from pageferry.pager.firecracker.events import ServeResult, Serving
from pageferry.pager.firecracker.options import ServeArguments, ServeOptions
from pageferry.pager.serve_process import SERVERS, VmmKind, start_detached
from pageferry.stores.lazy_image import open_image_file
from pageferry.workloads.callbacks import check_listener


async def serve_async(
    image: str | Path,
    *,
    firecracker: str | Path | None = None,
    cloud_hypervisor: str | Path | None = None,
    detach: bool = False,
    listener: Listener = ignore,
    **options: Unpack[ServeArguments],
) -> ServeResult | Serving:
    """Load the memory of microVMs of Firecracker from an image, on demand and in the background; or restore a VM of
    Cloud Hypervisor from an image.

    `firecracker` is the path of the socket to create: the `backend_path` of `PUT /snapshot/load` with `backend_type`
    `Uffd`. The image is one that `import_image` has written. The event `Serving` states that it accepts connections.
    Returns when the requested number of microVMs have connected, and each has loaded all of its memory or has exited.
    On cancellation, the microVMs that need more memory are killed or stopped (`on_failure`). `detach`: start a process
    that serves, and return the event; the process ends on SIGTERM.

    `cloud_hypervisor` is the path of the socket on which Cloud Hypervisor waits for a migration: the `receiver_url` of
    `PUT vm.receive-migration`, without `unix:`. The image is one that `checkpoint_cloud_hypervisor` has written.
    Returns when all memory is loaded, or Cloud Hypervisor has exited. With `on_demand`, the VM runs before its memory
    is loaded (`memory_mode` `Postcopy`); with `paused`, it is not resumed.

    `options` are the fields of `pageferry.pager.firecracker.options.ServeOptions`: eager, prefetch, on_failure,
    microvms, on_demand, paused, key, key_command, allow_plain. The image must not be moved until all memory is loaded.
    It can be given by its URL in a store (docs/stores.md), where a key opens an encrypted image.

    Raises UsageError if the socket cannot be used or the image is not that of such a VM, ImageError if it is damaged,
    RestoreError if Cloud Hypervisor cannot restore the VM.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("4MiB")
        >>> result = pageferry.checkpoint(arena, "image")
        >>> pageferry.serve("image", firecracker="memory.sock")  # not the image of a snapshot
        Traceback (most recent call last):
        pageferry.errors.UsageError: ...
    """
    source = image_argument("image", image)
    check_listener("listener", values.function("listener", listener))
    chosen = values.options(ServeOptions, options)
    kind, socket = _kind(firecracker, cloud_hypervisor, chosen)
    values.flag("detach", detach)
    async with local_image_async("image", source, chosen) as path:  # opened, the image needs no name
        if detach:
            return await in_thread(start_detached, kind, path, socket, chosen.without_keys())
        opened = await in_thread(open_image_file, path)
    return await _serve(kind, opened, socket, chosen, listener)


async def _serve(
    kind: VmmKind, image: ImageFile, socket: Path, options: ServeOptions, listener: Listener
) -> ServeResult:
    server = SERVERS[kind](image, socket, options, listener)
    try:
        listener(server.serving)
        return await server.run()
    finally:
        server.close()


def _kind(
    firecracker: str | Path | None, cloud_hypervisor: str | Path | None, options: ServeOptions
) -> tuple[VmmKind, Path]:
    """Return the kind of the virtual machine monitor, and the path of the socket. Raises UsageError."""
    if (firecracker is None) == (cloud_hypervisor is None):
        raise UsageError("invalid socket: expected either `firecracker` or `cloud_hypervisor`")
    if firecracker is not None:
        options.check_for_firecracker()
        return "firecracker", values.path("firecracker", firecracker)
    options.check_for_cloud_hypervisor()
    return "cloud-hypervisor", values.path("cloud_hypervisor", cloud_hypervisor)


serve = synchronous(serve_async)
