"""Start of a pager process, and the orders to it (see `orders`)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pageferry._engine import PageSet
from pageferry.errors import RestoreError, UsageError
from pageferry.host import proc, processes
from pageferry.host.blocking import in_thread
from pageferry.host.python import start_python
from pageferry.host.registry import Folder
from pageferry.images.metadata import ImageIdentity
from pageferry.pager import client, orders, records
from pageferry.pager.protocol import PagerRequest, PagerStatus
from pageferry.pager.records import Deferred

_END_TIMEOUT = 0.3
"""Maximum time to wait for the exit of a killed pager, seconds. A process that waits for a disk does not exit."""

T = TypeVar("T")
Expected = TypeVar("Expected", bound=orders.Reply)


class PagerProcess:
    """Pager process, started by the constructor. It outlives this process once it serves a workload.

    Methods that send an order are coroutines, except `evict`, which is called in a pause. They raise the errors of the
    pager, and RestoreError if the pager exits.
    """

    def __init__(self) -> None:
        self._connection, inherited = socket.socketpair()
        with inherited:
            self._process = start_python(
                "pageferry.pager.process",
                stdin=inherited.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the pager."""
        return self._process.pid

    # -- orders

    async def open(self, path: str | Path, name: str, expected: ImageIdentity | None = None) -> orders.Opened:
        """Open the image of workload `name`. `expected`: identity of the image that the restore began with.

        Raises ImageError, RestoreError if another image is at `path`.
        """
        order = orders.Open(path=_absolute(path), expected=expected, name=name)
        return await in_thread(self._ask, order, orders.Opened)

    async def serve(self, folder: Folder, work: Deferred, *, taken_over: bool = False, evicting: bool = False) -> None:
        """Serve a workload, on demand only. Raises CannotHandleFaults, RestoreError, WorkloadError, UsageError."""
        order = orders.Serve(
            registry=_absolute(folder.registry.path),
            name=folder.name,
            work=work,
            taken_over=taken_over,
            evicting=evicting,
        )
        await in_thread(self._ask, order, orders.Serving)

    async def load(self, work: Deferred) -> AsyncIterator[orders.Loading]:
        """Load all contents, for a workload that does not run yet. Yield the progress. Raises ImageError."""
        reply = await in_thread(self._ask, orders.Load(work=work), orders.Loading)
        yield reply
        while not reply.finished:
            reply = await in_thread(self._reply, orders.Loading)
            yield reply

    def evict(self, region: int, pages: PageSet) -> int:
        """Evict pages of a paused workload. Return the number of evicted pages. Blocks for milliseconds."""
        return self._ask(orders.Evict(region=region, pages=pages.pack()), orders.Evicted).pages

    async def end_evictions(self) -> int:
        """Allow the pager to finish when all pages are loaded. Return the number of deferred pages."""
        return (await in_thread(self._ask, orders.EndEvictions(), orders.Evicted)).pages

    def leave(self) -> None:
        """Detach from the pager, which continues without this process. It loads in the background if prefetch is
        enabled."""
        with contextlib.suppress(OSError):  # the pager has exited: later requests to it report that
            orders.send(self._connection, orders.Fill())
        self.close()

    # -- exit of the pager

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` and return its result. If the pager exits first, cancel `work`, and raise RestoreError."""
        task = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(self.wait_for_end())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise RestoreError(f"the pager exited before the workload ran{self._last_words()}")
        finally:
            ended.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_END_TIMEOUT)

    async def wait_for_end(self) -> None:
        """Wait until the process has exited."""
        started = proc.start_time(self.pid)
        if started is not None:
            await processes.wait_for_end(self.pid, started)

    def give_up(self) -> None:
        """Kill the process. May be called twice."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_TIMEOUT)
        self.close()

    def close(self) -> None:
        """Close the connection. A pager process that does not serve a workload then exits. May be called twice."""
        with contextlib.suppress(OSError):  # the pager has exited
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for a reply
        self._connection.close()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _ask(self, order: orders.AnyOrder, kind: type[Expected]) -> Expected:
        with contextlib.suppress(BrokenPipeError):  # the pager has exited: there is no reply
            orders.send(self._connection, order)
        return self._reply(kind)

    def _reply(self, kind: type[Expected]) -> Expected:
        reply = orders.receive_reply(self._connection)
        if isinstance(reply, orders.Failed):
            raise reply.error()
        if not isinstance(reply, kind):
            raise RestoreError(f"cannot start the pager: it exited{self._last_words()}")
        return reply

    def _last_words(self) -> str:
        """Return the output of an exited process, to be appended to a message."""
        stream = self._process.stderr
        assert stream is not None
        words = "" if stream.closed else stream.read().decode(errors="replace").strip()
        return f": {words}" if words else " without output"


async def take_over(folder: Folder, path: str | Path | None = None) -> PagerStatus | None:
    """Start another pager for a guest whose pager has exited. `path`: new path of the image.

    Return the progress of the restore. Raises UsageError if all memory is loaded, RestoreError if `path` is another
    image or the new pager fails, ImageError.
    """
    record = folder.load(records.RECORD, Deferred)
    if record is None:
        raise UsageError(f"cannot take over the restore of {folder.name}: all of its memory is loaded")
    pager = PagerProcess()
    try:
        image = path if path is not None else record.image
        await pager.open(image, folder.name, record.identity)
        await _dismiss_failed(folder)
        work = msgspec.structs.replace(record, image=_absolute(image))
        await pager.serve(folder, work, taken_over=True)
    except UsageError as running:
        pager.give_up()
        raise RestoreError(str(running)) from running
    except BaseException:
        pager.give_up()
        raise
    pager.leave()
    return await in_thread(client.status, folder)


def _absolute(path: str | Path) -> str:
    return str(Path(path).absolute())


async def _dismiss_failed(folder: Folder) -> None:
    """Stop a pager that is running but cannot read its image."""
    with contextlib.suppress(RestoreError):
        status = await in_thread(client.status, folder)
        if status is not None and status.failures:
            await dismiss(folder, status)


async def dismiss(folder: Folder, status: PagerStatus) -> None:
    """Stop the pager that returned this status. Accesses to missing pages wait until another pager takes over."""
    started = proc.start_time(status.pager)
    await in_thread(client.ask, folder, PagerRequest(what="stop"))
    if started is not None:
        await processes.wait_for_end(status.pager, started)
