"""Detached pager of virtual machine monitors: a process that outlives the command which has started it.

The command passes an `Order` as an argument, and reads the standard output until the process serves or has failed. The
standard error of the process is its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec

from pageferry.errors import PageferryError, RestoreError
from pageferry.events import Event, ignore
from pageferry.host import files
from pageferry.host.python import start_python
from pageferry.host.registry import Registry
from pageferry.pager.cloud_hypervisor.restore import Restore
from pageferry.pager.firecracker.events import MicrovmConnected, MicrovmEnded, Serving
from pageferry.pager.firecracker.options import ServeOptions
from pageferry.pager.firecracker.server import Server
from pageferry.pager.orders import Failed
from pageferry.printable import PrintableFormatter
from pageferry.stores.lazy_image import open_image_file

LOGS = ".serve"
"""Directory of the logs, in the run directory."""

log = logging.getLogger("pageferry.pager")


VmmKind = Literal["firecracker", "cloud-hypervisor"]
SERVERS: dict[VmmKind, type[Server | Restore]] = {"firecracker": Server, "cloud-hypervisor": Restore}
"""Class that serves each kind of virtual machine monitor."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Order to serve an image."""

    kind: VmmKind
    image: str
    """Absolute path."""
    socket: str
    """Absolute path."""
    log: str
    options: ServeOptions


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Reply: the socket accepts connections."""

    serving: Serving


_replies = msgspec.json.Decoder(Started | Failed)


def start_detached(kind: VmmKind, image: Path, socket: Path, options: ServeOptions) -> Serving:
    """Start a process that serves an image, and wait until its socket accepts connections. Blocks.

    Raises the errors of the process, RestoreError if it ends without a reply.
    """
    folder = Registry().path / LOGS
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files.check_private(folder, "remove it")
    path = folder / f"{os.getpid()}.{os.urandom(2).hex()}.log"
    order = Order(kind=kind, image=str(image.absolute()), socket=str(socket.absolute()), log=str(path), options=options)
    output = files.create_log(path)
    try:
        process = start_python(
            "pageferry.pager.serve_process",
            msgspec.json.encode(order).decode(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,
        )
    finally:
        os.close(output)
    assert process.stdout is not None
    with process.stdout as stream:
        line = stream.readline()
    if not line:
        raise RestoreError(f"cannot start the pager: it exited without a reply; see {path}")
    reply: Started | Failed = _replies.decode(line)
    if isinstance(reply, Failed):
        process.wait()
        path.unlink(missing_ok=True)
        raise reply.error()
    return reply.serving


def _log_event(event: Event) -> None:
    """Write an event to the log. Failures and refusals are logged where they occur."""
    match event:
        case MicrovmConnected():
            log.info("microVM %d: connected, %d bytes deferred", event.microvm, event.deferred)
        case MicrovmEnded():
            log.info("microVM %d: %s, %d bytes deferred", event.microvm, event.end, event.deferred)
        case _:
            ignore(event)


async def _serve(order: Order) -> None:
    server = SERVERS[order.kind](open_image_file(order.image), Path(order.socket), order.options, _log_event)
    task = asyncio.ensure_future(server.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    _reply(Started(serving=msgspec.structs.replace(server.serving, log=order.log)))
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        server.close()


def _reply(reply: Started | Failed) -> None:
    """Send the reply, and redirect the standard output, for which the command waits, to the log."""
    files.write_all(1, msgspec.json.encode(reply) + b"\n")
    os.dup2(2, 1)


def main(argument: str) -> int:
    """Execute an order. Return the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("pageferry").setLevel(logging.INFO)
    try:
        asyncio.run(_serve(msgspec.json.decode(argument, type=Order)))
    except (PageferryError, OSError) as error:
        log.error("%s", error)
        _reply(Failed(kind=type(error).__name__, message=str(error)))
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
