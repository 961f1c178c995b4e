"""Client of the control socket: an arena of another process as a `Migratable`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Self, TypeVar

import msgspec

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.memory.regions import Identity, Region, Segment
from pageferry.workloads.arena.control_socket import protocol as wire
from pageferry.workloads.direct_io import pause_briefly
from pageferry.workloads.handle import Handle
from pageferry.workloads.lifecycle import Status
from pageferry.workloads.program import ProgramWorkload
from pageferry.workloads.protocols import Condition, Faults, OwnershipRecord

TIMEOUT = 60.0
"""Seconds to wait for a reply. The program runs its callbacks before it replies, and these may take a long time."""

T = TypeVar("T")
Wanted = TypeVar("Wanted", bound=wire.Message)


class RemoteArena(ProgramWorkload):
    """Arena of another process of this host. `connect` returns an instance.

    If this object has paused the arena and not committed it, the arena continues when the object is closed or this
    process exits. Methods raise WorkloadError if the program refuses a request, WorkloadDied if the program has exited.
    """

    def __init__(self, connection: socket.socket, path: str) -> None:
        """Request the description of the arena over `connection`, a blocking socket. `path`: path of the
        socket, for error messages."""
        self._connection = connection
        self._path = path
        self._lock = threading.Lock()
        self._cut = False
        """Whether a request was cancelled, and the connection shut down. The program then continues as if its client
        had exited."""
        try:
            description, files = self._describe()
        except BaseException:
            connection.close()
            raise
        self.name = description.name
        self.pid = description.pid
        self._direct_io = description.direct_io
        self.handed_out = description.handed_out
        self._identity = Identity(description.kind, description.name, dict(description.details))
        self.regions = tuple(_region(*pair) for pair in zip(description.regions, files, strict=True))

    @classmethod
    async def connect(cls, path: str) -> Self:
        """Connect to the control socket at `path`. Raises WorkloadDied if no process serves it, WorkloadError if the
        socket belongs to another user."""
        return await in_thread(cls._connect, path)

    @classmethod
    def _connect(cls, path: str) -> Self:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(TIMEOUT)
        try:
            connection.connect(path)
        except PermissionError as denied:
            connection.close()
            raise WorkloadError(
                f"cannot use {path}: it belongs to another user; run as that user, or as root"
            ) from denied
        except OSError as gone:
            connection.close()
            raise WorkloadDied(f"cannot connect to {path}: the program has exited ({gone})") from gone
        return cls(connection, path)

    @property
    def identity(self) -> Identity:
        """Kind, name and details of the workload, as described by its owner."""
        return self._identity

    @property
    def registered(self) -> bool:
        """True: only arenas with a name have a control socket."""
        return True

    @property
    def pager(self) -> None:
        """None: deferred contents are loaded by another process."""

    async def condition(self) -> Condition:
        """Return the status of the arena."""
        return Condition(str(await self.status()))

    def check_migratable(self) -> None:
        """Do nothing: only pageferry manages an arena."""

    async def check_mappers(self) -> None:
        """See `Migratable`. The check runs in the program."""
        await self._do(wire.CheckMappers())

    async def prepare_pause(self) -> None:
        """Do nothing: the program has no callback for this."""

    async def does_direct_io(self) -> bool:
        """Return whether the program may do direct I/O into the arena."""
        return self._direct_io

    async def drain(self) -> float | None:
        """Run the pause and resume callbacks of the program, unless it does no direct I/O into the arena."""
        if not self._direct_io or not await self.running():
            return None
        return await pause_briefly(self)

    async def pause(self) -> None:
        """Request that the program stop all writes. The program continues if this process exits before `commit`."""
        await self._do(wire.Pause())

    async def resume(self) -> None:
        """Resume the program."""
        if not self._cut:
            await self._do(wire.Resume())

    async def save_state(self) -> bytes:
        """Return the state of the program that is needed in addition to its memory."""
        return await self._cancellable(self._save_state)

    async def load_state(self, state: bytes) -> None:
        """Send a state to the program."""
        for data, last in wire.pieces(state):
            await self._do(wire.LoadState(data=data, last=last))

    async def commit(self, record: OwnershipRecord | None = None) -> None:
        """Leave the program paused until `resume` or `discard`, even if this process exits. `record` is not used."""
        await self._do(wire.Commit())

    async def discard(self) -> None:
        """Report to the program that its arena has been migrated. The program may exit before it replies."""
        with contextlib.suppress(WorkloadDied):
            await self._do(wire.Discard())

    async def running(self) -> bool:
        """Return whether the arena is running."""
        return await self.status() is Status.RUNNING

    async def status(self) -> Status:
        """Return the status of the arena."""
        return Status((await in_thread(self._ask, wire.GetStatus(), wire.StatusReply)).status)

    def faults(self) -> Faults:
        """Return the page faults of the program's own threads."""
        reply = self._ask(wire.GetFaults(), wire.FaultsReply)
        return Faults(reply.minor, reply.major)

    async def report(self) -> dict[str, object]:
        """Return data that the program reports about itself, for display and for benchmarks."""
        return (await in_thread(self._ask, wire.GetReport(), wire.ReportReply)).report

    async def attach(self) -> Handle:
        """Return a handle for this process, which then counts as a writer of the memory."""
        return (await in_thread(self._ask, wire.Attach(), wire.HandleReply)).handle

    def close(self) -> None:
        """Close the socket and the files. An arena that this object has paused and not committed continues."""
        self._connection.close()
        wire.close_all([region.fd for region in self.regions])
        self.regions = ()

    async def _do(self, request: wire.Request) -> None:
        await self._cancellable(lambda: self._ask(request, wire.Done))

    async def _cancellable(self, call: Callable[[], T]) -> T:
        """Run a request. On cancellation, shut down the connection, which ends the thread that waits for the reply."""
        try:
            return await in_thread(call)
        except asyncio.CancelledError:
            self._cut = True
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            raise

    def _ask(self, request: wire.Request, wanted: type[Wanted]) -> Wanted:
        with self._lock:
            self._send(request)
            return self._receive(wanted)[0]

    def _describe(self) -> tuple[wire.Description, list[int]]:
        self._send(wire.Describe())
        description, files = self._receive(wire.Description, wire.MAX_REGIONS)
        if len(files) != len(description.regions):
            wire.close_all(files)
            raise WorkloadError(
                f"the program at {self._path} sent {len(files)} files for {len(description.regions)} regions"
            )
        return description, files

    def _save_state(self) -> bytes:
        state = bytearray()
        with self._lock:
            self._send(wire.SaveState())
            while True:
                piece, _ = self._receive(wire.StateReply)
                if len(state) + len(piece.data) > wire.MAX_STATE:
                    self._connection.close()
                    raise WorkloadError(
                        f"cannot save {self.name}: its state is larger than {wire.MAX_STATE} bytes; put it in the arena"
                    )
                state += piece.data
                if piece.last:
                    return bytes(state)

    def _send(self, request: wire.Request) -> None:
        try:
            wire.send(self._connection, request)
        except OSError as gone:
            raise WorkloadDied(f"the program at {self._path} has exited: {gone}") from gone

    def _receive(self, wanted: type[Wanted], most: int = 0) -> tuple[Wanted, list[int]]:
        try:
            reply, files = wire.receive_reply(self._connection, most)
        except TimeoutError as slow:
            # A later reply would be mistaken for the reply to the next request.
            self._connection.close()
            raise WorkloadError(
                f"cannot control the program at {self._path}: no reply within {TIMEOUT:.0f} s"
            ) from slow
        except (EOFError, OSError) as gone:
            raise WorkloadDied(f"the program at {self._path} has exited: {gone}") from gone
        except (ValueError, msgspec.MsgspecError) as wrong:
            self._connection.close()
            raise WorkloadError(f"the program at {self._path} sent an invalid reply: {wrong}") from wrong
        if isinstance(reply, wire.Refused):
            wire.raise_refusal(reply)
        if not isinstance(reply, wanted):
            wire.close_all(files)
            raise WorkloadError(f"the program at {self._path} sent an unexpected reply {type(reply).__name__}")
        return reply, files


def _region(info: wire.RegionInfo, file: int) -> Region:
    segments = tuple(Segment(part.pid, part.address, part.length, part.offset) for part in info.segments)
    return Region(info.name, info.length, file, info.file_offset, info.page_size, segments)
