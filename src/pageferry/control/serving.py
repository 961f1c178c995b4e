"""Service for virtual machine monitors that load their memory from an image."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from pageferry import values
from pageferry.checkpoints.image_source import image_argument, local_image_async
from pageferry.events import Listener, ignore
from pageferry.host.blocking import in_thread, synchronous
from pageferry.pager.firecracker.events import ServeResult, Serving
from pageferry.pager.firecracker.options import ServeArguments, ServeOptions
from pageferry.pager.firecracker.process import start_detached
from pageferry.pager.firecracker.server import Server
from pageferry.stores.lazy_image import open_image_file
from pageferry.workloads.callbacks import check_listener


async def serve_async(
    image: str | Path,
    *,
    firecracker: str | Path,
    detach: bool = False,
    listener: Listener = ignore,
    **options: Unpack[ServeArguments],
) -> ServeResult | Serving:
    """Load the memory of microVMs of Firecracker from an image, on demand and in the background.

    `firecracker` is the path of the socket that this function creates: the `backend_path` of `PUT /snapshot/load` with
    `backend_type` `Uffd`. The image is one that `import_image` has written. The event `Serving` states that the socket
    accepts connections. Returns when the requested number of microVMs have connected, and each has loaded all of its
    memory or has exited. On cancellation, the microVMs that need more memory are killed or stopped (`on_failure`).
    `detach`: start a process that serves, and return the event; the process ends on SIGTERM.

    `options` are the fields of `pageferry.pager.firecracker.options.ServeOptions`: eager, prefetch, on_failure,
    microvms, key, key_command, allow_plain. The image must not be moved until all memory is loaded. It can be given by
    its URL in a store (docs/stores.md), where a key opens an encrypted image.

    Raises UsageError if the socket cannot be created or the image is not that of a snapshot, ImageError if it is
    damaged.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("4MiB")
        >>> result = pageferry.checkpoint(arena, "image")
        >>> pageferry.serve("image", firecracker="memory.sock")  # not the image of a snapshot
        Traceback (most recent call last):
        pageferry.errors.UsageError: ...
    """
    source, socket = image_argument("image", image), values.path("firecracker", firecracker)
    check_listener("listener", values.function("listener", listener))
    chosen = values.options(ServeOptions, options)
    values.flag("detach", detach)
    async with local_image_async("image", source, chosen) as path:  # opened, the image needs no name
        if detach:
            return await in_thread(start_detached, path, socket, chosen.without_keys())
        opened = await in_thread(open_image_file, path)
    server = Server(opened, socket, chosen, listener)
    try:
        listener(server.serving)
        return await server.run()
    finally:
        server.close()


serve = synchronous(serve_async)
