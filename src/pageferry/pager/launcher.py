"""Start of a pager process, and the orders to it (see `orders`)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import msgspec

from pageferry._engine import PageSet
from pageferry.errors import RestoreError, UsageError
from pageferry.host import proc, processes
from pageferry.host.blocking import in_thread
from pageferry.host.python import start_python
from pageferry.host.registry import Folder, Registry
from pageferry.images.metadata import ImageIdentity
from pageferry.pager import base_records, client, orders, records
from pageferry.pager.base_protocol import BaseStatus
from pageferry.pager.base_records import BaseFolder, CloneRecord
from pageferry.pager.protocol import PagerRequest, PagerStatus
from pageferry.pager.records import Deferred

_END_TIMEOUT = 0.3
"""Maximum time to wait for the exit of a killed pager, seconds. A process that waits for a disk does not exit."""

_REPLY_TIMEOUT = 5.0
"""Maximum time to wait for the pager of a base to accept a connection, and for its first reply, seconds."""

T = TypeVar("T")
Expected = TypeVar("Expected", bound=orders.Reply)


class PagerConnection:
    """Connection to a pager process that executes orders.

    Methods that send an order are coroutines, except `ask_base_status`, `evict` and `leave`. They raise the errors of
    the pager, and RestoreError if the pager exits.
    """

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self.pid = pid
        """Process id of the pager."""

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

    async def open_base(self, registry: Registry) -> orders.BaseOpened | orders.BaseElsewhere:
        """Serve the base of the open image, unless another pager serves it. Raises ImageError, WorkloadError."""
        order = orders.OpenBase(registry=_absolute(registry.path))
        return await in_thread(self._ask, order, orders.BaseOpened | orders.BaseElsewhere)

    async def share(self, name: str, work: CloneRecord) -> None:
        """Replace the memory of a guest with a private mapping of the base, before the guest runs.

        Raises CannotHandleFaults, UnsupportedError for memory that cannot be replaced, RestoreError.
        """
        await in_thread(self._ask, orders.Share(name=name, work=work), orders.Shared)

    async def join(self, name: str, work: CloneRecord) -> None:
        """Serve a program that has registered its mapping of the base, or, without a userfaultfd, load the base
        completely. Raises CannotHandleFaults, ImageError."""
        await in_thread(self._ask, orders.Join(name=name, work=work), orders.Joined)

    async def ensure(self, offset: int, length: int, image: str) -> None:
        """Load a range of the base (`offset` and `length` in bytes), and return when it is present. Raises
        ImageError."""
        await in_thread(self.ensure_now, offset, length, image)

    def ensure_now(self, offset: int, length: int, image: str) -> None:
        """Like `ensure`. Blocks until the range is present."""
        self._ask(orders.Ensure(offset=offset, length=length, image=image), orders.Ensured)

    async def base_status(self) -> BaseStatus:
        """Return the state of the base."""
        return await in_thread(self.ask_base_status)

    def ask_base_status(self) -> BaseStatus:
        """Return the state of the base. Blocks for milliseconds."""
        return self._ask(orders.GetBase(), orders.BaseState).status

    async def load(self, work: Deferred) -> AsyncIterator[orders.Loading]:
        """Load all contents, for a workload that is not running yet. Yield the progress. Raises ImageError."""
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
        """Detach from the pager, which continues without this process. If prefetch is enabled, the pager loads contents
        in the background."""
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
            raise RestoreError(f"cannot run the workload: its pager exited first{self._last_words()}")
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
        """Close the connection, after the guest could not be restored. May be called twice."""
        self.close()

    def close(self) -> None:
        """Close the connection. A pager process that does not serve a workload then exits. May be called twice."""
        with contextlib.suppress(OSError):  # the pager has exited
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for a reply
        self._connection.close()

    def limit_waiting(self, limited: bool) -> None:
        """Choose whether orders fail, with RestoreError, if the pager does not reply in time."""
        self._connection.settimeout(_REPLY_TIMEOUT if limited else None)

    def _ask(self, order: orders.AnyOrder, kind: type[Expected] | UnionType) -> Expected:
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the pager has exited: no reply
                orders.send(self._connection, order)
            return self._reply(kind)
        except TimeoutError as late:
            raise RestoreError(
                f"cannot reach the pager (process {self.pid}): no reply within {_REPLY_TIMEOUT:.0f} s; resume it if it "
                "is stopped, or kill it: the next pager takes over its guests"
            ) from late

    def _reply(self, kind: type[Expected] | UnionType) -> Expected:
        reply = orders.receive_reply(self._connection)
        if isinstance(reply, orders.Failed):
            raise reply.error()
        if not isinstance(reply, kind):
            raise RestoreError(f"cannot start the pager: it exited{self._last_words()}")
        return reply

    def _last_words(self) -> str:
        """Return the output of an exited process, to be appended to an error message."""
        return ""


class PagerProcess(PagerConnection):
    """Pager process, started by the constructor. It outlives this process once it serves a workload."""

    def __init__(self) -> None:
        connection, inherited = socket.socketpair()
        with inherited:
            self._process = start_python(
                "pageferry.pager.process",
                stdin=inherited.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        super().__init__(connection, self._process.pid)
        self._serves_base = False
        """Whether other commands may have started clones with this pager."""

    async def open_base(self, registry: Registry) -> orders.BaseOpened | orders.BaseElsewhere:
        """See `PagerConnection`."""
        self._serves_base = True
        return await super().open_base(registry)

    def give_up(self) -> None:
        """Kill the process, unless it may serve clones of other commands. May be called twice."""
        if not self._serves_base:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_TIMEOUT)
        self.close()

    def close(self) -> None:
        """Close the connection. A pager process that does not serve a workload then exits. May be called twice."""
        super().close()
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _last_words(self) -> str:
        """Return the output of an exited process, to be appended to an error message."""
        stream = self._process.stderr
        assert stream is not None
        words = "" if stream.closed else stream.read().decode(errors="replace").strip()
        return f" ({self._how_it_ended()})" + (f": {words}" if words else " without output")

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            return "it is exiting"
        return f"exit code {code}" if code >= 0 else processes.signal_name(-code)


async def take_over(folder: Folder, path: str | Path | None = None) -> PagerStatus | None:
    """Start another pager for a guest whose pager has exited. `path`: new path of the image.

    Return the progress of the restore. Raises UsageError if all memory is loaded, RestoreError if `path` is another
    image or the new pager fails, ImageError.
    """
    if (clone := base_records.clone_record(folder)) is not None:
        return await take_over_base(folder.registry, folder.name, clone, path)
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


def connect_to_base(registry: Registry, image: str | Path) -> PagerConnection | None:
    """Connect to the pager of the base of an image file; return None if none is running. Blocks for milliseconds.

    A pager that has replied does not exit before the connection is closed. Raises RestoreError if a running pager does
    not reply in time.
    """
    folder = base_records.find_base(registry, image)
    return connect_to_pager_of(folder) if folder is not None else None


def connect_to_pager_of(folder: BaseFolder, identity: ImageIdentity | None = None) -> PagerConnection | None:
    """Connect as `connect_to_base` does, given the directory of the base. `identity`: required identity of the
    image."""
    record = folder.load()
    if record is None or identity not in (None, record.identity):
        return None
    try:
        pager = connect_to_pager(folder.socket, record.pager)
    except OSError:  # the pager has exited
        return None
    try:
        pager.ask_base_status()
    except (OSError, RestoreError) as failed:
        pager.close()
        if isinstance(failed.__cause__, TimeoutError):
            raise
        return None  # the pager is exiting
    pager.limit_waiting(False)
    return pager


def connect_to_pager(path: str, pid: int) -> PagerConnection:
    """Connect to the pager of a base, and limit the time that orders wait for a reply. `path`: socket for orders.
    Raises OSError."""
    connection = socket.socket(socket.AF_UNIX)
    pager = PagerConnection(connection, pid)
    try:
        pager.limit_waiting(True)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return pager


def status_of_base(folder: BaseFolder) -> BaseStatus | None:
    """Return the state of a base; None if its pager has exited. Blocks. Raises RestoreError."""
    record = folder.load()
    if record is None:
        return None
    try:
        pager = connect_to_pager(folder.socket, record.pager)
    except OSError:
        return None
    try:
        return pager.ask_base_status()
    finally:
        pager.close()


async def take_over_base(
    registry: Registry, name: str, clone: CloneRecord, path: str | Path | None = None
) -> PagerStatus:
    """Start another pager for the base of a clone. The pager takes over all clones of the image. Raises RestoreError,
    ImageError."""
    pager = PagerProcess()
    try:
        await pager.open(path if path is not None else clone.image, name, clone.identity)
        if isinstance(await pager.open_base(registry), orders.BaseElsewhere):
            raise RestoreError(f"cannot take over {name}: its pager is running")
        status = await pager.base_status()
    except BaseException:
        pager.give_up()
        raise
    pager.leave()
    return PagerStatus(
        image=status.image,
        pager=status.pager,
        deferred=status.deferred,
        finished=not status.deferred,
        faults=0,
        missed=0,
        loaded=0,
        prefetched=0,
        bytes_read=status.bytes_read,
        service=0.0,
        longest=0.0,
        histogram=[],
        failures=status.failures,
        accessed=0,
    )


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
