"""Device state of a QEMU guest: all state other than memory, saved and loaded by QEMU's own migration.

With the capability `x-ignore-shared` QEMU omits memory in shared files from its migration stream. The remaining stream
(CPUs, devices, ROMs, video memory) is about 1 MiB long. QEMU sends it through one end of a socket pair, which is passed
to QEMU with `getfd`, so that no failure leaves a file behind. This was tested with QEMU 7.2, 10.0 and 11.1. QEMU 8.1
and later omit memory only if its file has a path, as pageferry's memory file does.

The migration starts while the guest runs (`Saving`). QEMU sends ROMs and video memory, stops the vCPUs, and waits in
the state `pre-switchover` until pageferry sends `migrate-continue`; then it writes the devices. This is the order of
QEMU's own migration, and keeps its set-up and two thirds of the stream out of the pause.

QEMU's migration has two side effects: it releases the disks of the guest, and it sets the run state to `postmigrate`,
which only `cont` can change. The state of a guest that stays paused, or that keeps its disks (see
`DiskSaving.keeps_disks`), is therefore saved by `snapshot` instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import NamedTuple, Self, TypeVar

import msgspec
from qemu.qmp import EventListener

from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host.qmp import Command, Monitor, event_time
from pageferry.workloads.protocols import StateSink

VERSION = 2
"""Version of saved states."""
MAX_STATE = 512 << 20
"""Maximum size of a stream, bytes. A larger stream contains guest memory."""

_LENGTH = 4
"""Size of the length field of a header, bytes."""
_MAX_HEADER = 64 << 10
"""Maximum size of a header, bytes."""

DESCRIPTOR = "pageferry-state"
"""Name in QEMU of the descriptor of a stream."""
_CHUNK = 1 << 20
_UNLIMITED = 1 << 40
"""Bandwidth limit, bytes per second. No effective limit is needed, because a process on the same host receives the
stream."""

_NEEDED = ("x-ignore-shared", "events")
_TO_SAVE = "pause-before-switchover"
_KEPT = frozenset({"dirty-bitmaps", "validate-uuid", "late-block-activate"})
"""Capabilities that determine the contents of a migration, not its method. They keep the values set by the user."""

_WAITING = "pre-switchover"
_ENDED = frozenset({"completed", "failed", "cancelled"})
_CANCEL_TIMEOUT = 10.0

_LATE_ACTIVATION = "late-block-activate"
"""Capability of an incoming QEMU: the disks are opened and locked by `cont`, not at the end of the stream. Without this
capability, QEMU before 10.0 holds the locks of shared disks before the source has committed, and the source cannot
continue.
"""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First part of a saved state, before QEMU's migration stream: a length (32 bits, big endian), and MessagePack of
    this length."""

    version: int = VERSION
    machine: str
    """Machine type with its version, such as `pc-i440fx-7.2`; source and destination must have the same type."""
    was_running: bool
    """Whether the guest was running before the pause. A guest that its user had paused stays paused at the
    destination."""

    def encode(self) -> bytes:
        """Return the header, preceded by its length."""
        data = msgspec.msgpack.encode(self)
        return len(data).to_bytes(_LENGTH, "big") + data

    @classmethod
    def decode(cls, state: bytes) -> tuple[Header | None, int]:
        """Return the header at the beginning of a state (None if it is incomplete), and its length in bytes, including
        the length field. Raises WorkloadError if the header is invalid."""
        length = _LENGTH + int.from_bytes(state[:_LENGTH], "big")
        if length > _MAX_HEADER:
            raise WorkloadError("cannot read the device state: its header is too long; it was not saved by pageferry")
        if len(state) < max(length, _LENGTH + 1):
            return None, length
        return _decode(state[_LENGTH:length], Header), length


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `QemuWorkload.save_state` and argument of `load_state`: a header, then QEMU's migration stream.

    Version 1, in images of earlier versions of pageferry, is a single MessagePack map with these fields.
    """

    version: int = VERSION
    machine: str
    was_running: bool
    stream: bytes

    def encode(self) -> bytes:
        """Return the state as bytes."""
        return Header(machine=self.machine, was_running=self.was_running).encode() + self.stream

    @classmethod
    def decode(cls, data: bytes) -> SavedState:
        """Decode a state. Raises WorkloadError if `data` is not a saved state of a supported version."""
        if data[:1] != b"\0":
            return _decode(data, SavedState)
        header, length = Header.decode(data)
        if header is None:
            raise WorkloadError(
                "cannot read the device state: truncated within its header; copy the image again, or save the "
                "guest again"
            )
        return cls(machine=header.machine, was_running=header.was_running, stream=data[length:])


Versioned = TypeVar("Versioned", Header, SavedState)


def _decode(data: bytes, kind: type[Versioned]) -> Versioned:
    try:
        found = msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as wrong:
        raise WorkloadError(f"cannot read the device state: {wrong}; it was not saved by pageferry") from wrong
    if found.version != (VERSION if kind is Header else 1):
        raise WorkloadError(
            f"cannot read the device state: unsupported version {found.version}, this pageferry supports {VERSION}; "
            "use a newer pageferry"
        )
    return found


async def _ignore(chunk: bytes) -> None:
    """Ignore a chunk: `finish` returns it again."""


class Settings(NamedTuple):
    """Commands that set QEMU up to migrate device state alone, at unlimited bandwidth, and commands that restore the
    previous settings."""

    apply: list[Command]
    undo: list[Command]


async def plan(monitor: Monitor, *, incoming: bool = False) -> Settings:
    """Return the settings for saving or, with `incoming`, for loading device state, without applying them.

    Raises UnsupportedError if QEMU lacks a required capability. Also raises WorkloadError.
    """
    reported, parameters = await asyncio.gather(
        monitor.execute("query-migrate-capabilities"), monitor.execute("query-migrate-parameters")
    )
    before = {item["capability"]: item["state"] for item in reported}
    required = [*_NEEDED] if incoming else [*_NEEDED, _TO_SAVE]
    if missing := [name for name in required if name not in before]:
        raise UnsupportedError(
            f"unsupported QEMU: it lacks the migration capability {', '.join(missing)}; use a newer QEMU"
        )
    needed = {*required, _LATE_ACTIVATION} if incoming else {*required}
    wanted = {name: name in needed or (state and name in _KEPT) for name, state in before.items()}
    changed = {name: state for name, state in wanted.items() if before[name] != state}
    settings = Settings([], [])
    if changed:
        settings.apply.append(_set_capabilities(changed))
        settings.undo.append(_set_capabilities({name: before[name] for name in changed}))
    bandwidth = parameters["max-bandwidth"]
    if bandwidth != _UNLIMITED:
        settings.apply.append(_set_bandwidth(_UNLIMITED))
        settings.undo.append(_set_bandwidth(bandwidth))
    return settings


class Saving:
    """Migration of the device state of a running guest. Create it with `begin`, then call `stopped` and `finish`, or
    `cancel`."""

    def __init__(self, monitor: Monitor, held: contextlib.ExitStack) -> None:
        self._monitor = monitor
        self._held = held
        self._progress = held.enter_context(monitor.events("MIGRATION"))
        self._stop = held.enter_context(monitor.events("STOP"))
        self._end = held.enter_context(monitor.events("SHUTDOWN", "GUEST_PANICKED"))
        self._stream = bytearray()
        self._ahead = True
        """Whether chunks may be loaded ahead: QEMU has not begun to write the devices."""
        self._reading: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def begin(cls, monitor: Monitor, sink: StateSink = _ignore) -> Self:
        """Start the migration of a guest to which the settings of `plan` were applied. QEMU stops the vCPUs shortly
        afterwards.

        `sink` receives chunks of the stream that may be loaded before memory is complete. Raises WorkloadError with
        QEMU's message, WorkloadDied.
        """
        with contextlib.ExitStack() as held:
            saving = cls(monitor, held)
            ours = held.enter_context(await channel(monitor))
            saving._reading = asyncio.ensure_future(saving._receive(ours, sink))
            held.callback(saving._reading.cancel)
            try:
                await monitor.execute("migrate", uri=f"fd:{DESCRIPTOR}")
            except asyncio.CancelledError:  # QEMU executes the command all the same
                held.close()
                await asyncio.shield(cancelled(monitor))
                raise
            saving._held = held.pop_all()
        return saving

    async def stopped(self) -> float | None:
        """Wait until QEMU has stopped the vCPUs. Return the time of the stop, on the clock of `time.perf_counter`; None
        if the vCPUs were not running.

        Raises WorkloadError if the state cannot be saved, WorkloadDied if QEMU exits.
        """
        await self._reach(_WAITING)
        self._ahead = False
        if self._stop.empty() or not self._end.empty():
            return None
        return event_time(await self._stop.get())

    async def finish(self) -> bytes:
        """Have QEMU write the devices, and return the whole stream. Raises the same errors as `stopped`."""
        await self._monitor.execute("migrate-continue", state=_WAITING)
        await self._reach("completed")
        await self._reading
        self._held.close()
        return bytes(self._stream)

    async def cancel(self) -> None:
        """End the migration, if it is running. QEMU then resumes the vCPUs, unless it has written all devices."""
        self.close()
        await cancelled(self._monitor)

    def close(self) -> None:
        """Close the connection to QEMU, and stop reading the stream."""
        self._held.close()

    async def _receive(self, ours: socket.socket, sink: StateSink) -> None:
        async for chunk in _chunks(ours):
            self._stream += chunk
            if self._ahead:
                await sink(chunk)

    async def _reach(self, status: str) -> None:
        """Wait for a status of the migration. Raises the exception of `sink` or of the connection if either fails
        first."""
        reaching = asyncio.ensure_future(_reach(self._monitor, self._progress, status))
        try:
            await asyncio.wait((reaching, self._reading), return_when=asyncio.FIRST_COMPLETED)
            if not reaching.done():
                self._reading.result()
            await reaching
        finally:
            reaching.cancel()


class Loading:
    """QEMU process that waits for a device state on a connection to this process. `begin` returns an instance; `finish`
    or `close` ends the wait."""

    def __init__(self, monitor: Monitor, ours: socket.socket, held: contextlib.ExitStack) -> None:
        self._monitor = monitor
        self._ours = ours
        self._held = held
        self._progress = held.enter_context(monitor.events("MIGRATION"))
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._sending = asyncio.ensure_future(self._send())
        held.callback(self._sending.cancel)
        self.fed = 0
        """Number of bytes of the stream passed to `feed`."""

    @classmethod
    async def begin(cls, monitor: Monitor) -> Self:
        """Have a QEMU that was started with `-incoming defer` wait for a state. The settings of `plan` must be applied.
        Raises WorkloadError, WorkloadDied."""
        with contextlib.ExitStack() as held:
            ours = held.enter_context(await channel(monitor))
            loading = cls(monitor, ours, held)
            await monitor.execute("migrate-incoming", uri=f"fd:{DESCRIPTOR}")
            loading._held = held.pop_all()
        return loading

    def feed(self, chunk: bytes) -> None:
        """Pass QEMU the next chunk of a stream, one that `Saving` has passed to its `sink`."""
        self.fed += len(chunk)
        self._chunks.put_nowait(chunk)

    async def finish(self, stream: bytes) -> None:
        """Load the remaining part of a migration stream. The guest stays paused. `stream`: the whole stream, from its
        beginning.

        Raises WorkloadError with QEMU's message, or WorkloadDied: some QEMU versions exit if they cannot load a stream.
        """
        with self._held:
            if rest := stream[self.fed :]:
                self.feed(rest)
            self._chunks.put_nowait(b"")
            # If the transfer fails, QEMU's migration fails too.
            await _reach(self._monitor, self._progress, "completed")
            await self._sending

    def close(self) -> None:
        """Close the connection. QEMU's incoming migration then fails."""
        self._held.close()

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        # QEMU closes the connection at the first invalid byte, and reports the reason in its event.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while chunk := await self._chunks.get():
                await loop.sock_sendall(self._ours, chunk)
        self._ours.close()


async def channel(monitor: Monitor) -> socket.socket:
    """Create a socket pair, pass one end to QEMU, and return the other."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        with theirs:
            await monitor.give_descriptor(DESCRIPTOR, theirs.fileno())
    except BaseException:
        ours.close()
        raise
    return ours


async def _reach(monitor: Monitor, events: EventListener, status: str) -> None:
    """Wait until QEMU's migration has this status. Raises WorkloadError if it ends with another status."""
    while (now := (await monitor.next_event(events)).get("status")) != status:
        if now in _ENDED:
            said = (await monitor.execute("query-migrate")).get("error-desc", f"its migration is {now}")
            raise WorkloadError(f"cannot transfer the device state: {said}")


async def _chunks(source: socket.socket) -> AsyncIterator[bytes]:
    """Yield the chunks of a stream until QEMU closes it. Raises WorkloadError if the stream is too long."""
    loop, length = asyncio.get_running_loop(), 0
    while True:
        try:
            chunk = await loop.sock_recv(source, _CHUNK)
        except ConnectionResetError:
            chunk = b""
        if not chunk:  # the event of QEMU reports whether the stream is complete
            return
        length += len(chunk)
        if length > MAX_STATE:
            raise WorkloadError(
                f"cannot save the device state: it is larger than {MAX_STATE >> 20} MiB, so it contains guest memory; "
                "put all guest memory in shared files"
            )
        yield chunk


async def cancelled(monitor: Monitor) -> None:
    """Wait for at most `_CANCEL_TIMEOUT` seconds until QEMU has terminated an outgoing migration whose connection is
    closed.

    The migration either fails at its next write, or waits in `pre-switchover` and is cancelled there. It is not
    cancelled earlier, because QEMU 7.2 waits forever after a cancellation just before that state.
    """
    with contextlib.suppress(WorkloadError, TimeoutError):
        async with asyncio.timeout(_CANCEL_TIMEOUT):
            # The event listener is closed, so the end can only be detected by polling.
            while (status := (await monitor.execute("query-migrate")).get("status", "none")) not in _ENDED | {"none"}:
                if status == _WAITING:
                    await monitor.execute("migrate_cancel")
                await asyncio.sleep(0.005)


def _set_capabilities(states: dict[str, bool]) -> Command:
    items = [{"capability": name, "state": state} for name, state in states.items()]
    return {"execute": "migrate-set-capabilities", "arguments": {"capabilities": items}}


def _set_bandwidth(limit: int) -> Command:
    return {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": limit}}
