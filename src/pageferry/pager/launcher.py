"""Start of a pager process, and the handover of a workload from one pager to the next."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from pathlib import Path

import msgspec

from pageferry.errors import RestoreError, UsageError
from pageferry.host import proc, processes
from pageferry.host.blocking import in_thread
from pageferry.host.python import start_python
from pageferry.host.registry import Folder
from pageferry.images import targets
from pageferry.images.image import ImageFile
from pageferry.pager import client, records
from pageferry.pager.process import GuestPager, Order, Serving
from pageferry.pager.protocol import PagerRequest, PagerStatus
from pageferry.pager.records import Deferred


class PagerProcess:
    """Pager process of a guest. It inherits the open files of the image and of its parents, not their paths."""

    def __init__(self, image: ImageFile) -> None:
        descriptors = [link.image.fileno() for link in image.links]
        paths = [str(link.path.absolute()) for link in image.links]
        files = [f"{descriptor}:{path}" for descriptor, path in zip(descriptors, paths, strict=True)]
        self._process = start_python(
            "pageferry.pager.process",
            *files,
            pass_fds=descriptors,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Process id of the pager."""
        return self._process.pid

    async def ready(self) -> None:
        """Wait until it has opened the image. Raises RestoreError, with its error message, if it cannot."""
        await in_thread(self._answer)

    async def take_over(self, order: Order) -> None:
        """Let it serve the guest, after `ready`. Raises RestoreError, with its error message, if it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.close()
        await in_thread(self._answer)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            words = self._process.stderr.read().decode(errors="replace").strip()
            raise RestoreError(f"cannot start the pager: it exited{': ' + words if words else ' without output'}")
        serving = msgspec.json.decode(line, type=Serving)
        if serving.error is not None:
            raise RestoreError(serving.error)

    def give_up(self) -> None:
        """Kill the process. May be called twice."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


async def hand_over(first: GuestPager) -> PagerStatus:
    """Hand over from the pager in this process to a separate one. In between, the guest waits at missing pages.

    Return what the first one has done.
    """
    pager = PagerProcess(first.image)
    name, serving = first.folder.name, True
    try:
        await pager.ready()
        touched = first.pager.touched
        last = first.server.status(touched=touched)
        serving = False
        await in_thread(first.close)
        await pager.take_over(Order(name=name, touched=touched))
    except asyncio.CancelledError:
        pager.give_up()
        raise
    except RestoreError as error:
        pager.give_up()
        if serving:
            await in_thread(first.close)  # otherwise no pager could take over while this process lives
        raise RestoreError(
            f"{error}; {name} runs and waits for its memory: to start another pager, run pageferry restore "
            f"--takeover {name}"
        ) from error
    return last


async def take_over(folder: Folder, path: str | Path | None = None) -> PagerStatus | None:
    """Start another pager for a guest whose pager has exited. `path`: new path of the image.

    Return the progress of the restore. Raises UsageError if there is nothing to take over, RestoreError (another image,
    or a failed pager), ImageError.
    """
    record = folder.load(records.RECORD, Deferred)
    if record is None:
        raise UsageError(f"cannot take over the restore of {folder.name}: all of its memory is loaded")
    image = targets.open_expected(path if path is not None else record.image, record.identity, folder.name)
    await _dismiss_failed(folder)
    pager = PagerProcess(image)
    try:
        await pager.ready()
        await pager.take_over(Order(name=folder.name))
    except BaseException:
        pager.give_up()
        raise
    return await in_thread(client.status, folder)


async def _dismiss_failed(folder: Folder) -> None:
    """Stop a pager that is running but cannot read its image."""
    with contextlib.suppress(RestoreError):
        status = await in_thread(client.status, folder)
        if status is not None and status.failures:
            await dismiss(folder, status)


async def dismiss(folder: Folder, status: PagerStatus) -> None:
    """Stop the pager that returned this status. Accesses to missing pages wait until another one takes over."""
    started = proc.start_time(status.pager)
    await in_thread(client.ask, folder, PagerRequest(what="stop"))
    if started is not None:
        await processes.wait_for_end(status.pager, started)
