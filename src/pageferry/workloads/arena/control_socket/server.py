"""Server of the control socket: threads that reply to requests about one arena."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from pageferry.errors import PageferryError
from pageferry.host import files
from pageferry.host.blocking import serve_this_process
from pageferry.host.peer_credentials import peer_credentials
from pageferry.memory.regions import Region
from pageferry.workloads.arena.control_socket import protocol as wire
from pageferry.workloads.lifecycle import Lifecycle

THREAD_NAME = "pageferry-control"
"""Name of every thread of a server. Such threads belong to pageferry, not to the workload."""

MAX_CLIENTS = 16


class Owned(Protocol):
    """Workload of this process."""

    lifecycle: Lifecycle


class ControlServer:
    """Server of the control socket at `path` for one workload. It runs in daemon threads until it is closed.

    The socket is created with mode 0600. Each connection is a separate controller (`workloads.lifecycle`). Only
    connections keep the workload alive: the server itself has a weak reference. `stopped`: function that the accepting
    thread calls when it ends.
    """

    def __init__(self, workload: Owned, path: str, stopped: Callable[[], object] = lambda: None) -> None:
        self._workload = weakref.ref(workload)
        self._stopped = stopped
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            files.bind_private(self._listener, path)
            self._listener.listen(MAX_CLIENTS)
        except BaseException:
            self._listener.close()
            raise
        self._thread = _start(self._accept)

    def stop_listening(self) -> None:
        """Accept no further clients."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Accept no further clients, and disconnect the connected ones. If a client had paused the workload without a
        commit, the workload continues.
        """
        self.stop_listening()
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    client, _ = self._listener.accept()
                except OSError:  # shut down by close()
                    break
                if _is_trusted(client) and self._add(client):
                    _start(self._serve, client)
                else:
                    client.close()
        self._stopped()

    def _add(self, client: socket.socket) -> bool:
        with self._lock:
            if len(self._clients) >= MAX_CLIENTS:
                return False
            self._clients.add(client)
            return True

    def _serve(self, client: socket.socket) -> None:
        workload = self._workload()
        try:
            if workload is not None:
                _control(workload.lifecycle, client)
        finally:
            with self._lock:
                self._clients.discard(client)
            client.close()


class _Session:
    """Session of one client, which is a controller of the workload."""

    def __init__(self, lifecycle: Lifecycle, client: socket.socket) -> None:
        self._lifecycle = lifecycle
        self._client = client
        self._state = bytearray()
        self._regions: tuple[Region, ...] = ()
        """Regions that were sent in the Description."""
        self._version = lifecycle.memory_version
        """Version of the memory when the regions were read."""

    def run(self) -> None:
        """Reply to requests until the client disconnects or sends an invalid message."""
        while True:
            try:
                request = wire.receive_request(self._client)
                if request is None:
                    return
                self._reply(request)
            except (OSError, ValueError, msgspec.MsgspecError):
                return

    def _reply(self, request: wire.Request) -> None:
        try:
            replies = list(self._replies(request))
        except Exception as error:  # a callback may raise any exception: report it to the client
            wire.send(self._client, wire.refusal(error))
            return
        for reply in replies:
            with_memory = isinstance(reply, wire.Description)
            files = tuple(region.fd for region in self._regions) if with_memory else ()
            wire.send(self._client, reply, files)

    def _replies(self, request: wire.Request) -> Iterator[wire.Reply]:
        lifecycle = self._lifecycle
        match request:
            case wire.Describe(version=version):
                yield self._describe(version)
            case wire.GetStatus():
                yield wire.StatusReply(status=lifecycle.status.value)
            case wire.GetFaults():
                faults = lifecycle.workload.faults()
                yield wire.FaultsReply(minor=faults.minor, major=faults.major)
            case wire.GetReport():
                yield wire.ReportReply(report=lifecycle.workload.report())
            case wire.Attach():
                yield wire.HandleReply(handle=lifecycle.workload.attached_by(peer_credentials(self._client).pid))
            case wire.SaveState():
                for data, last in wire.pieces(lifecycle.save_state(self, self._version)):
                    yield wire.StateReply(data=data, last=last)
            case wire.LoadState(data=data, last=last):
                self._load(data, last)
                yield wire.Done()
            case _:
                self._act(request)
                yield wire.Done()

    def _act(self, request: wire.CheckMappers | wire.Pause | wire.Resume | wire.Commit | wire.Discard) -> None:
        match request:
            case wire.CheckMappers():
                self._lifecycle.workload.check_mappers(self._regions)
                self._lifecycle.check_mappers(self._version)
            case wire.Pause():
                self._lifecycle.pause(self)
            case wire.Resume():
                self._lifecycle.resume(self)
            case wire.Commit():
                self._lifecycle.commit(self)
            case wire.Discard():
                self._lifecycle.discard(self)

    def _load(self, data: bytes, last: bool) -> None:
        if len(self._state) + len(data) > wire.MAX_STATE:
            raise ValueError(f"cannot load the state: it is larger than {wire.MAX_STATE} bytes, the limit")
        self._state += data
        if last:
            state, self._state = bytes(self._state), bytearray()
            self._lifecycle.load_state(self, state)

    def _describe(self, version: int) -> wire.Description:
        if version != wire.VERSION:
            raise PageferryError(
                f"unsupported version {version} of the control protocol: the program supports {wire.VERSION}; use the "
                "pageferry that it was started with"
            )
        workload = self._lifecycle.workload
        self._version = self._lifecycle.memory_version
        self._regions = workload.regions
        identity = workload.identity
        return wire.Description(
            version=wire.VERSION,
            pid=os.getpid(),
            kind=identity.kind,
            name=identity.name,
            details=identity.details,
            direct_io=workload.direct_io,
            regions=[
                wire.RegionInfo(
                    region.name,
                    region.length,
                    region.file_offset,
                    region.page_size,
                    [wire.SegmentInfo(part.pid, part.address, part.length, part.offset) for part in region.segments],
                )
                for region in self._regions
            ],
            handed_out=workload.sharing.handed_out,
        )


def _control(lifecycle: Lifecycle, client: socket.socket) -> None:
    """Serve one client until it disconnects."""
    peer = peer_credentials(client).pid
    lifecycle.workload.observed_by(peer)
    if peer == os.getpid():
        serve_this_process()
    session = _Session(lifecycle, client)
    try:
        session.run()
    finally:
        lifecycle.lost(session)


def _start(target: object, *arguments: object) -> threading.Thread:
    assert callable(target)
    thread = threading.Thread(target=target, args=arguments, name=THREAD_NAME, daemon=True)
    thread.start()
    return thread


def _is_trusted(client: socket.socket) -> bool:
    """Return whether the peer runs as the user of this process, or as root."""
    return peer_credentials(client).uid in (0, os.geteuid())
