"""Restore of a VM by Cloud Hypervisor from an image (S10): the sender of its local migration.

Cloud Hypervisor waits for the migration (`PUT vm.receive-migration`). This side connects to its socket, and sends the
files of the memory, the configuration and the state. Without loading on demand, the files are complete before they are
sent. With it, Cloud Hypervisor requests pages over a second connection (see `memory`).

If Cloud Hypervisor loses that connection, it lets the guest run with pages of zeros until it has exited. The process of
Cloud Hypervisor is therefore killed or stopped before the connection is closed, unless all pages have been requested:
by this process, or if this process is killed, by a guardian, which keeps the connection open until then.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import threading
import time
from concurrent.futures import Future
from logging import getLogger
from pathlib import Path

from pageferry.errors import ImageError, PageferryError, RestoreError, UsageError
from pageferry.events import Latency, Listener
from pageferry.host.blocking import in_thread, on_thread, to_the_end
from pageferry.host.guardian import Guardian, SendSignal
from pageferry.host.workers import in_new_thread
from pageferry.images import targets
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager.cloud_hypervisor.memory import VmMemory
from pageferry.pager.cloud_hypervisor.protocol import FAULT_ROLE, Channel, Command, InvalidMessage, Refused
from pageferry.pager.cloud_hypervisor.slots import saved_vm
from pageferry.pager.firecracker.events import (
    End,
    MicrovmConnected,
    MicrovmEnded,
    MicrovmFailed,
    ServeResult,
    Serving,
)
from pageferry.pager.firecracker.options import ServeOptions
from pageferry.pager.firecracker.peer import SIGNALS, Peer

log = getLogger(__name__)

CONNECT_TIMEOUT = 10.0
"""Maximum time until Cloud Hypervisor listens on the socket, seconds."""
REQUEST_TIMEOUT = 10.0
"""Maximum time from the restored state to the first request for a page, seconds."""
_RETRY = 0.02
_POLL = 0.05
_LATER = (errno.ENOENT, errno.ECONNREFUSED)


class Restore:
    """Restore of one VM. The constructor raises UsageError if the image is not that of a VM, ImageError if it is
    damaged."""

    def __init__(self, image: ImageFile, path: Path, options: ServeOptions, listener: Listener) -> None:
        targets.check_cloud_hypervisor(image)
        self.image = image
        self.path = path.absolute()
        self._saved, slots = saved_vm(image)
        self._options = options
        self._report = listener
        self._memory = VmMemory(image, slots, options)
        self._channel: Channel | None = None
        self._faults: Channel | None = None
        """Connection for page faults."""
        self._answers: Future[bool] | None = None
        """Result of the thread that answers requests."""
        self._unanswered: BaseException | None = None
        """Error of that thread, which has ended the migration; None if there is none."""
        self._abandoned = False
        self._peer: Peer | None = None
        self._guardian: Guardian | None = None
        self._cut = threading.Event()
        """Set when the operation is cancelled."""
        self._begin = time.monotonic()
        self._failed: list[str] = []

    @property
    def serving(self) -> Serving:
        """Event that the restore begins."""
        return Serving(
            image=str(self.image.path),
            socket=str(self.path),
            pager=os.getpid(),
            memory=self.image.pages * SMALL_PAGE,
        )

    async def run(self) -> ServeResult:
        """Restore the VM. Return when all of its memory is loaded, or Cloud Hypervisor has exited.

        Raises RestoreError if the VM does not run. If it needs pages that cannot be loaded, Cloud Hypervisor is killed
        or stopped (`on_failure`), also on cancellation.
        """
        end: End = "frozen"
        try:
            await self._send()
            end = await self._until_loaded()
        except BaseException as error:
            end = await to_the_end(self._fail(error))
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
                raise
            if self._peer is None or not self._failed:
                raise self._explained(self._unanswered or error) from error
        finally:
            await to_the_end(self._finish(end))
        return ServeResult(
            image=str(self.image.path),
            socket=str(self.path),
            microvms=1,
            loaded=int(end == "loaded"),
            failed=self._failed,
        )

    def close(self) -> None:
        """Close all files and sockets. May be called twice."""
        for channel in (self._channel, self._faults):
            if channel is not None:
                channel.close()
        self._memory.close()

    # -- the migration

    async def _send(self) -> None:
        self._channel = await on_thread(lambda: self._connected(None), self._cut.set)
        self._peer = Peer(self._channel.socket)
        if self._options.on_demand:
            await in_thread(self._guard)
        await on_thread(self._transfer, self._interrupt)
        deferred = self._memory.deferred
        page_size = self.image.metadata.regions[0].page_size
        pid, count = self._peer.pid, len(self._memory.slots)
        self._report(MicrovmConnected(microvm=pid, page_size=page_size, deferred=deferred, mappings=count))

    def _connected(self, prepared: socket.socket | None) -> Channel:
        """Connect to the socket, on which Cloud Hypervisor may begin to listen soon. Raises UsageError."""
        deadline = time.monotonic() + (CONNECT_TIMEOUT if prepared is None else 1.0)
        while True:
            connection = prepared or socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.path))
                return Channel(connection)
            except OSError as error:
                if prepared is None:
                    connection.close()
                if error.errno not in _LATER or time.monotonic() > deadline or self._cut.is_set():
                    raise UsageError(
                        f"cannot connect to {self.path}: {error.strerror or error}; send `PUT vm.receive-migration` "
                        "to Cloud Hypervisor with this socket as `receiver_url`"
                    ) from error
                time.sleep(_RETRY)

    def _guard(self) -> None:
        """Start the guardian, which inherits the connection for page faults."""
        assert self._peer is not None
        connection = socket.socket(socket.AF_UNIX)
        self._faults = Channel(connection)
        pidfd = self._peer.descriptor
        self._guardian = Guardian(f"the VM of process {self._peer.pid}", [pidfd, connection.fileno()])

    def _transfer(self) -> None:
        """Send the VM. Raises Refused, InvalidMessage, RestoreError, ImageError, OSError."""
        channel, memory = self._main, self._memory
        channel.request(Command.START)
        if self._options.on_demand:
            memory.serve()
        else:
            memory.load(self._loading)
        for slot, file in zip(memory.slots, memory.files, strict=True):
            channel.send_memory(slot.slot, file)
        channel.request(Command.CONFIG, self._saved.config)
        if self._options.on_demand:
            self._start_answering()
        channel.request(Command.STATE, self._saved.state)
        if self._options.on_demand:
            self._await_request()
        channel.request(Command.COMPLETE_PAUSED if self._options.paused else Command.COMPLETE)

    def _loading(self, _deferred: int, _prefetched: int, _bytes_read: int) -> None:
        """Stop loading when the operation is cancelled."""
        if self._cut.is_set():
            raise InterruptedError

    @property
    def _main(self) -> Channel:
        assert self._channel is not None
        return self._channel

    def _start_answering(self) -> None:
        """Connect the second connection, and answer the requests for pages in a thread."""
        assert self._faults is not None
        assert self._guardian is not None
        assert self._peer is not None
        try:
            faults = self._connected(self._faults.socket)
        except UsageError as error:
            self._abandon()
            raise self._not_postcopy() from error
        self._guardian.plan([SendSignal(self._peer.descriptor, SIGNALS[self._options.on_failure])])
        faults.socket.sendall(FAULT_ROLE)
        self._answers = in_new_thread("pageferry-requests", lambda: self._answer(faults))

    def _answer(self, faults: Channel) -> bool:
        pager = self._memory.pager
        assert pager is not None
        try:
            if self._first_request(faults):
                self._check_version()
            return pager.answer_requests(faults.socket.fileno(), self._memory.ranges)
        except BaseException as error:
            self._unanswered = error
            self._main.cut()  # it may wait for a reply that requires a page
            raise

    def _first_request(self, faults: Channel) -> bool:
        """Wait for the first request, without receiving it. Return False if the connection has ended."""
        poll = select.poll()
        poll.register(faults.socket, select.POLLIN)
        while not poll.poll(100):
            if self._cut.is_set():
                return False
        try:
            return bool(faults.socket.recv(1, socket.MSG_PEEK))
        except ConnectionError:
            return False

    def _check_version(self) -> None:
        """Raise RestoreError if the guest would not wait for a page that the pager has not written completely. Call
        this before the first reply: later, Cloud Hypervisor may have unregistered the memory."""
        assert self._peer is not None
        if not self._memory.reports_present(self._peer.pid):
            raise RestoreError(
                f"cannot restore {self.image.path} on demand: this version of Cloud Hypervisor does not request pages "
                "that the pager is just writing, and its guest would read them incomplete; use version 54 or newer, or "
                "omit --on-demand (in Python on_demand)"
            )

    def _await_request(self) -> None:
        """Wait for the first request for a page. Without one, Cloud Hypervisor would run the VM with pages of zeros."""
        pager, deadline = self._memory.pager, time.monotonic() + REQUEST_TIMEOUT
        assert pager is not None
        while not pager.counters.faults:
            assert self._answers is not None
            if self._unanswered is not None:
                raise self._unanswered
            if time.monotonic() > deadline or self._cut.is_set() or self._answers.done():
                self._abandon()
                raise self._not_postcopy()
            time.sleep(_RETRY / 10)

    def _abandon(self) -> None:
        """Make Cloud Hypervisor discard the VM, which has not run and needs no more pages."""
        self._abandoned = True
        try:
            self._main.request(Command.ABANDON)
        except (PageferryError, OSError) as error:
            log.warning("cannot abandon the restore of %s: %s", self.image.path, error)

    def _not_postcopy(self) -> RestoreError:
        return RestoreError(
            f"cannot restore {self.image.path} on demand: Cloud Hypervisor does not request pages; set `memory_mode` "
            "to `Postcopy` in `PUT vm.receive-migration`, or omit --on-demand (in Python on_demand)"
        )

    # -- the end

    async def _until_loaded(self) -> End:
        """Wait until Cloud Hypervisor has requested all pages or has exited."""
        if self._answers is None:
            return "loaded"
        assert self._peer is not None
        await asyncio.wait({asyncio.wrap_future(self._answers)})
        abandoned = self._answers.result()
        await asyncio.wait({asyncio.ensure_future(self._peer.wait_for_end())}, timeout=_POLL)
        if abandoned or self._peer.exited():
            return "exited"
        pager = self._memory.pager
        assert pager is not None
        if pager.pending:
            # Cloud Hypervisor requests every page before it closes the connection.
            raise InvalidMessage(f"it has closed the connection before it has requested {pager.pending} pages")
        await in_thread(self._memory.map_large, self._peer.pid)
        return "loaded"

    async def _fail(self, error: BaseException) -> End:
        """Kill or stop Cloud Hypervisor if it may wait for pages. Return the end of the VM."""
        peer, answers = self._peer, self._answers
        if peer is None or answers is None or self._abandoned or peer.exited():
            return "exited"
        if answers.done() and answers.exception() is None and not self._memory.deferred:
            return "loaded"
        cancelled = isinstance(error, asyncio.CancelledError)
        reason = "the pager was stopped" if cancelled else str(self._explained(self._unanswered or error))
        self._failed.append(f"microVM {peer.pid}: {reason}")
        action = self._options.on_failure
        log.error("microVM %d: %s; action: %s", peer.pid, reason, action)
        if (failed := await peer.stop(action)) is not None:
            log.error("microVM %d: %s", peer.pid, failed)
        self._report(MicrovmFailed(microvm=peer.pid, reason=reason, action=action))
        return "killed" if action == "kill" else "frozen"

    def _explained(self, error: BaseException) -> BaseException:
        """Return an error as one of this operation."""
        where = f"cannot restore {self.image.path}"
        match error:
            case Refused() | InvalidMessage() | BrokenPipeError() | ConnectionResetError():
                return RestoreError(f"{where}: Cloud Hypervisor has failed: {error}; see its log")
            case ConnectionAbortedError():
                return RestoreError(f"{where}: Cloud Hypervisor has sent an invalid request: {error}")
            case ValueError() if not isinstance(error, PageferryError):
                return ImageError(f"{where}: {error}; take another checkpoint")
            case OSError():
                return RestoreError(f"{where}: {error.strerror or error}")
            case _:
                return error

    def _interrupt(self) -> None:
        self._cut.set()
        self._main.cut()

    async def _finish(self, end: End) -> None:
        """Stop the pager, and report the end. Close the connection for page faults last."""
        peer = self._peer
        if self._guardian is not None:
            self._guardian.plan([])
            await in_thread(self._guardian.finish)
        if self._faults is not None:
            self._faults.cut()
        if self._answers is not None:
            await asyncio.wait({asyncio.wrap_future(self._answers)})
        if peer is not None and self._memory.pager is not None:
            self._memory.learn()
            self._report(self._ended(peer, end))
        if peer is not None:
            peer.close()
        await in_thread(self.close)

    def _ended(self, peer: Peer, end: End) -> MicrovmEnded:
        pager = self._memory.pager
        assert pager is not None
        counters = pager.counters
        return MicrovmEnded(
            microvm=peer.pid,
            end=end,
            deferred=self._memory.deferred,
            faults=counters.faults,
            missed=counters.missed,
            prefetched=counters.prefetched,
            bytes_read=counters.bytes_read,
            duration_ms=(time.monotonic() - self._begin) * 1e3,
            service_times=Latency.of(pager.histogram, counters.longest * 1e6),
        )
