"""`pageferry-offload-daemon`: replacement of Cloud Hypervisor's `offload_daemon`, with the same arguments.

    pageferry-offload-daemon snapshot --socket SOCKET --output-dir DIR
    pageferry-offload-daemon restore --socket SOCKET --input-dir DIR [--resume] [--ondemand]

`snapshot` waits for the local migration of a VM, and saves the VM to the image `vm.img` in DIR. Cloud Hypervisor waits
until the image is complete. `restore` restores the VM of that image. `SOCKET.lock` is locked while `snapshot` uses the
socket, so that the socket that a killed process has left can be removed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pageferry.checkpoints.options import Options
from pageferry.checkpoints.save import save
from pageferry.checkpoints.target import FileTarget
from pageferry.errors import PageferryError, RestoreError, UsageError
from pageferry.events import ignore
from pageferry.host import files
from pageferry.host.blocking import on_thread
from pageferry.images.image import ImageFile
from pageferry.pager.cloud_hypervisor.protocol import Channel
from pageferry.pager.cloud_hypervisor.restore import Restore
from pageferry.pager.firecracker.options import ServeOptions
from pageferry.printable import PrintableFormatter
from pageferry.workloads.cloud_hypervisor.vm import CloudHypervisorVm

IMAGE = "vm.img"
"""Name of the image in the directory."""
_FLOCK = struct.Struct("@hhqqi4x")
"""`struct flock`: type, origin, start, length (0: the whole file), process id (0 for F_OFD_SETLK)."""

log = logging.getLogger("pageferry.offload")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    result = argparse.ArgumentParser(
        "pageferry-offload-daemon", description="Save and restore VMs of Cloud Hypervisor."
    )
    verbs = result.add_subparsers(dest="verb", required=True)
    snapshot = verbs.add_parser("snapshot", help="save a VM that is migrated to a socket")
    snapshot.add_argument("--socket", type=Path, required=True, help="socket to create")
    snapshot.add_argument("--output-dir", type=Path, required=True, help=f"directory for the image {IMAGE}")
    restore = verbs.add_parser("restore", help="restore a VM by a Cloud Hypervisor that waits for a migration")
    restore.add_argument("--socket", type=Path, required=True, help="socket on which Cloud Hypervisor waits")
    restore.add_argument("--input-dir", type=Path, required=True, help=f"directory of the image {IMAGE}")
    restore.add_argument("--resume", action="store_true", help="resume the VM")
    restore.add_argument("--ondemand", action="store_true", help="load memory on demand")
    return result


async def run(args: argparse.Namespace) -> None:
    """Execute a verb. Raises PageferryError."""
    if args.verb == "snapshot":
        await _snapshot(args.socket.absolute(), args.output_dir)
    else:
        await _restore(
            args.socket, args.input_dir / IMAGE, ServeOptions(on_demand=args.ondemand, paused=not args.resume)
        )


async def _snapshot(path: Path, folder: Path) -> None:
    _create(folder)
    with _listening(path) as listener:
        log.info("%s: waiting for a VM", path)
        channel = await on_thread(lambda: Channel(listener.accept()[0]), lambda: listener.shutdown(socket.SHUT_RDWR))
        vm = await CloudHypervisorVm.receive(channel)
        try:
            await save(vm, FileTarget(folder / IMAGE), None, Options(mode="stop", track=False), ignore)
            await vm.complete()
        finally:
            vm.close()
    log.info("%s: saved to %s", vm.name, folder / IMAGE)


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create {folder}: {error.strerror or error}; use another directory") from error


async def _restore(path: Path, image: Path, options: ServeOptions) -> None:
    restore = Restore(ImageFile(image), path, options, ignore)
    try:
        result = await restore.run()
    finally:
        restore.close()
    if result.failed:
        raise RestoreError(result.failed[0])
    log.info("%s: restored from %s", path, image)


def _remove_socket(path: Path) -> None:
    """Remove a socket that a killed process has left. Raises UsageError for any other file, OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"cannot listen on {path}: it is a file that is not a socket; use another path")
        path.unlink()


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """Lock and create the socket for the block. Raises UsageError."""
    with contextlib.ExitStack() as stack:
        try:
            lock = files.open_private(f"{path}.lock", os.O_WRONLY)
            stack.callback(os.close, lock)
            fcntl.fcntl(lock, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            _remove_socket(path)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            files.bind_private(listener, str(path))
            stack.callback(path.unlink, missing_ok=True)
            listener.listen(1)
        except BlockingIOError as error:
            raise UsageError(
                f"cannot listen on {path}: another process has locked {path}.lock; use another path"
            ) from error
        except OSError as error:
            raise UsageError(f"cannot listen on {path}: {error.strerror or error}; use another path") from error
        yield listener


async def _until_signal(args: argparse.Namespace) -> None:
    task = asyncio.ensure_future(run(args))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await task


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Return the exit code: 0, that of the error, or 130 after SIGINT or SIGTERM."""
    args = parser().parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("pageferry").setLevel(logging.INFO)
    try:
        asyncio.run(_until_signal(args))
    except PageferryError as error:
        log.error("%s", error)
        return error.exit_code
    except asyncio.CancelledError:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
