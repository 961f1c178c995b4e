"""The controlling side: an arena of another process as a `Workload`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Self, TypeVar

import msgspec

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.blocking import in_thread
from pageferry.memory.regions import Identity, Region, Segment
from pageferry.workloads.arena.control_socket import protocol as wire
from pageferry.workloads.direct_io import pause_briefly
from pageferry.workloads.lifecycle import Status
from pageferry.workloads.protocols import Faults, Witness

TIMEOUT = 60.0
"""Seconds to wait for an answer: pause and state callbacks are the program's own."""

T = TypeVar("T")
Wanted = TypeVar("Wanted", bound=wire.Message)


class RemoteArena:
    """An arena that another process of this host owns. Made by `connect`.

    While this object has it paused and has not committed it, the arena runs on as soon as the object is closed or this
    process dies. Methods raise WorkloadError when the program refuses, WorkloadDied when it is gone.
    """

    def __init__(self, connection: socket.socket, path: str) -> None:
        """Ask the owner at the other end of `connection` (a blocking socket) what it has. `path` is for messages."""
        self._connection = connection
        self._path = path
        self._lock = threading.Lock()
        self._cut = False
        """A request was cancelled: the program may hang, and runs on as after the death of a client."""
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
        """Connect to the control socket at `path`. Raises WorkloadDied when nobody serves it, WorkloadError."""
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
        """What this workload is, as its owner describes it."""
        return self._identity

    async def check_mappers(self) -> None:
        """As of `Workload`; the program looks."""
        await self._do(wire.CheckMappers())

    async def prepare_pause(self) -> None:
        """Nothing: the program's callbacks are for the pause itself."""

    async def prepare_load(self) -> None:
        """Nothing: the program is asked when there is a state."""

    async def does_direct_io(self) -> bool:
        """As the program says."""
        return self._direct_io

    async def drain(self) -> float | None:
        """Run the program's pause and resume callbacks, unless it does no direct I/O into the arena."""
        if not self._direct_io or not await self.running():
            return None
        return await pause_briefly(self)

    async def pause(self) -> None:
        """Have the program stop everything that writes. It runs on if we go away before `commit`."""
        await self._do(wire.Pause())

    async def resume(self) -> None:
        """Let the program go on."""
        if not self._cut:
            await self._do(wire.Resume())

    async def save_state(self) -> bytes:
        """What the program wants to move besides its memory."""
        return await self._cancellable(self._save_state)

    async def load_state(self, state: bytes) -> None:
        """Give the program a state."""
        for data, last in wire.pieces(state):
            await self._do(wire.LoadState(data=data, last=last))

    async def commit(self, witness: Witness | None = None) -> None:
        """From here on the program stays paused, whoever dies, until `resume` or `discard`; no `witness` is needed."""
        await self._do(wire.Commit())

    async def prefault(self, units: Mapping[int, Sequence[int]] | None = None) -> int:
        """Nothing: the program's threads use the page tables of its processes."""
        return 0

    async def discard(self) -> None:
        """Tell the program that its arena has moved. It may end on that, even before it answers."""
        with contextlib.suppress(WorkloadDied):
            await self._do(wire.Discard())

    async def running(self) -> bool:
        """Whether the program has not paused it."""
        return await self.status() is Status.RUNNING

    async def status(self) -> Status:
        """Where the arena is in its life."""
        return Status((await in_thread(self._ask, wire.AskStatus(), wire.StatusIs)).status)

    def faults(self) -> Faults:
        """Page faults of the program's own threads."""
        answer = self._ask(wire.AskFaults(), wire.FaultsAre)
        return Faults(answer.minor, answer.major)

    async def report(self) -> dict[str, object]:
        """What the program says about itself."""
        return (await in_thread(self._ask, wire.AskReport(), wire.ReportIs)).report

    def close(self) -> None:
        """Let go of socket and files. An arena that is paused and not committed runs on."""
        self._connection.close()
        wire.close_all([region.fd for region in self.regions])
        self.regions = ()

    async def _do(self, request: wire.Request) -> None:
        await self._cancellable(lambda: self._ask(request, wire.Done))

    async def _cancellable(self, call: Callable[[], T]) -> T:
        """Run a request. On cancellation the connection is cut, which ends the thread that waits for the answer."""
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
            raise WorkloadError(f"{self._path} sent {len(files)} files for {len(description.regions)} regions")
        return description, files

    def _save_state(self) -> bytes:
        state = bytearray()
        with self._lock:
            self._send(wire.SaveState())
            while True:
                piece, _ = self._receive(wire.StateIs)
                if len(state) + len(piece.data) > wire.MAX_STATE:
                    self._connection.close()
                    raise WorkloadError(
                        f"{self.name}: its state is larger than {wire.MAX_STATE} bytes; put it in the arena"
                    )
                state += piece.data
                if piece.last:
                    return bytes(state)

    def _send(self, request: wire.Request) -> None:
        try:
            wire.send(self._connection, request)
        except OSError as gone:
            raise WorkloadDied(f"the program at {self._path} is gone: {gone}") from gone

    def _receive(self, wanted: type[Wanted], most: int = 0) -> tuple[Wanted, list[int]]:
        try:
            answer, files = wire.receive_answer(self._connection, most)
        except TimeoutError as slow:
            # An answer that comes later would be taken for that of another request.
            self._connection.close()
            raise WorkloadError(f"no reply from the program at {self._path} within {TIMEOUT:.0f} s") from slow
        except (EOFError, OSError) as gone:
            raise WorkloadDied(f"the program at {self._path} is gone: {gone}") from gone
        except (ValueError, msgspec.MsgspecError) as wrong:
            self._connection.close()
            raise WorkloadError(f"the program at {self._path} sent an invalid reply: {wrong}") from wrong
        if isinstance(answer, wire.Refused):
            wire.raise_refusal(answer)
        if not isinstance(answer, wanted):
            wire.close_all(files)
            raise WorkloadError(f"the program at {self._path} sent an unexpected reply {type(answer).__name__}")
        return answer, files


def _region(info: wire.RegionInfo, file: int) -> Region:
    segments = tuple(Segment(part.pid, part.address, part.length, part.offset) for part in info.segments)
    return Region(info.name, info.length, file, info.file_offset, info.page_size, segments)
