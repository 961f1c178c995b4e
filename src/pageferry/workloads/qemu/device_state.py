"""Device state of a QEMU guest: its state without memory, saved and loaded by QEMU's own migration.

With the capability `x-ignore-shared` QEMU omits memory in shared files from its migration stream. The remaining stream
(CPUs, devices, ROMs, video memory: about 1 MiB) is sent through one end of a socket pair that is passed to QEMU
(`getfd`), so that no failure leaves a file behind. Tested with QEMU 7.2 and 10.0; newer versions ignore only files with
a path, which pageferry's memory file has.

QEMU's migration has two side effects: it releases the disks of the guest, and it sets the run state to `postmigrate`,
which only `cont` can change. For a guest that runs next, these effects do no harm. The state of a guest that stays
paused is saved by `snapshot`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Coroutine
from typing import Any, NamedTuple, Self, TypeVar

import msgspec
from qemu.qmp import EventListener

from pageferry.errors import UnsupportedError, WorkloadError
from pageferry.host.qmp import Command, Monitor

MAX_STATE = 512 << 20
"""Maximum size of a stream, bytes. A larger stream contains guest memory."""

_DESCRIPTOR = "pageferry-state"
_CHUNK = 1 << 20
_UNLIMITED = 1 << 40
"""Bandwidth limit, bytes per second: in effect none, because the stream is received by a process of the same host."""

_NEEDED = ("x-ignore-shared", "events")
_KEPT = frozenset({"dirty-bitmaps", "validate-uuid", "late-block-activate"})
"""Capabilities that determine the contents of a migration, not its method: they keep the values set by the user."""

_ENDED = frozenset({"completed", "failed", "cancelled"})
_CANCEL_TIMEOUT = 5.0

_LATE_ACTIVATION = "late-block-activate"
"""Capability of an incoming QEMU: the disks are opened and locked by `cont`, not at the end of the stream. Without this
capability, QEMU before 10.0 holds the locks of shared disks before the source has committed, and the source cannot
continue.
"""

T = TypeVar("T")


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `QemuWorkload.save_state` and argument of `load_state`, as MessagePack."""

    version: int = 1
    machine: str
    """Machine type with its version, such as `pc-i440fx-7.2`; source and destination must have the same."""
    was_running: bool
    """Whether the guest ran before it was paused. A guest that its user had paused stays paused at the destination."""
    stream: bytes
    """QEMU's migration stream."""

    def encode(self) -> bytes:
        """Return the state as bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> SavedState:
        """Decode a state. Raises WorkloadError if `data` is not a saved state of a supported version."""
        try:
            state = msgspec.msgpack.decode(data, type=cls)
        except msgspec.MsgspecError as wrong:
            raise WorkloadError(f"cannot read the device state: {wrong}; it was not saved by pageferry") from wrong
        if state.version != 1:
            raise WorkloadError(
                f"unsupported version {state.version} of the device state: expected 1; use a newer pageferry"
            )
        return state


class Settings(NamedTuple):
    """Commands that set QEMU up to migrate device state alone, at unlimited bandwidth, and those that undo them."""

    apply: list[Command]
    undo: list[Command]


async def plan(monitor: Monitor, *, incoming: bool = False) -> Settings:
    """Return the settings for saving, or with `incoming` for loading. QEMU is not changed yet.

    Raises UnsupportedError if QEMU lacks a required capability, WorkloadError.
    """
    reported = await monitor.execute("query-migrate-capabilities")
    before = {item["capability"]: item["state"] for item in reported}
    if missing := [name for name in _NEEDED if name not in before]:
        raise UnsupportedError(
            f"unsupported QEMU: it lacks the migration capability {', '.join(missing)}; use a newer one"
        )
    needed = {*_NEEDED, _LATE_ACTIVATION} if incoming else {*_NEEDED}
    wanted = {name: name in needed or (state and name in _KEPT) for name, state in before.items()}
    changed = {name: state for name, state in wanted.items() if before[name] != state}
    settings = Settings([], [])
    if changed:
        settings.apply.append(_set_capabilities(changed))
        settings.undo.append(_set_capabilities({name: before[name] for name in changed}))
    bandwidth = (await monitor.execute("query-migrate-parameters"))["max-bandwidth"]
    if bandwidth != _UNLIMITED:
        settings.apply.append(_set_bandwidth(_UNLIMITED))
        settings.undo.append(_set_bandwidth(bandwidth))
    return settings


async def save(monitor: Monitor) -> bytes:
    """Return the migration stream of a paused guest, to which the settings of `plan` were applied. `cont` resumes the
    guest, also after a failure.

    Raises WorkloadError with QEMU's message if the state cannot be saved, WorkloadDied.
    """
    with await _channel(monitor) as ours:
        try:
            return await _run(monitor, "migrate", _receive(ours))
        except BaseException:
            ours.close()
            await asyncio.shield(_cancel(monitor))
            raise


class Loading:
    """QEMU that waits for a device state on a connection of this process. Made by `begin`; `finish` or `close` it."""

    def __init__(
        self, monitor: Monitor, ours: socket.socket, events: EventListener, held: contextlib.ExitStack
    ) -> None:
        self._monitor = monitor
        self._ours = ours
        self._events = events
        self._held = held

    @classmethod
    async def begin(cls, monitor: Monitor) -> Self:
        """Let a QEMU that was started with `-incoming defer` wait for a state, after `plan` was applied. Raises
        WorkloadError, WorkloadDied.
        """
        with contextlib.ExitStack() as held:
            ours = held.enter_context(await _channel(monitor))
            events = held.enter_context(monitor.events("MIGRATION"))
            await monitor.execute("migrate-incoming", uri=f"fd:{_DESCRIPTOR}")
            return cls(monitor, ours, events, held.pop_all())

    async def finish(self, stream: bytes) -> None:
        """Load a migration stream. The guest stays paused.

        Raises WorkloadError with QEMU's message, or WorkloadDied: some QEMU versions exit if they cannot load a stream.
        """
        with self._held:
            await _until_ended(self._monitor, self._events, asyncio.ensure_future(_send(self._ours, stream)))

    def close(self) -> None:
        """Close the connection."""
        self._held.close()


async def _channel(monitor: Monitor) -> socket.socket:
    """Create a socket pair, pass one end to QEMU, and return the other."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        with theirs:
            await monitor.give_descriptor(_DESCRIPTOR, theirs.fileno())
    except BaseException:
        ours.close()
        raise
    return ours


async def _run(monitor: Monitor, command: str, transfer: Coroutine[Any, Any, T]) -> T:
    """Start a migration over the descriptor, and run `transfer` concurrently until both have ended."""
    moving = asyncio.ensure_future(transfer)
    try:
        with monitor.events("MIGRATION") as events:
            await monitor.execute(command, uri=f"fd:{_DESCRIPTOR}")
            return await _until_ended(monitor, events, moving)
    finally:
        moving.cancel()


async def _until_ended(monitor: Monitor, events: EventListener, moving: asyncio.Future[T]) -> T:
    """Return the result of a transfer, once QEMU's migration has ended too."""
    ended = asyncio.ensure_future(_end(monitor, events))
    try:
        # The first error ends both: after a failed transfer QEMU would wait forever, and vice versa.
        result, _ = await asyncio.gather(moving, ended)
    finally:
        moving.cancel()
        ended.cancel()
    return result


async def _end(monitor: Monitor, events: EventListener) -> None:
    while (status := (await monitor.next_event(events)).get("status")) not in _ENDED:
        pass
    if status != "completed":
        said = (await monitor.execute("query-migrate")).get("error-desc", f"its migration is {status}")
        raise WorkloadError(f"QEMU could not transfer the device state: {said}")


async def _receive(source: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while True:
        try:
            chunk = await loop.sock_recv(source, _CHUNK)
        except ConnectionResetError:
            chunk = b""
        if not chunk:  # QEMU's event reports whether this is the end or a failure
            return bytes(data)
        data += chunk
        if len(data) > MAX_STATE:
            raise WorkloadError(
                f"the device state is larger than {MAX_STATE >> 20} MiB: guest memory is in it, not in a shared file"
            )


async def _send(target: socket.socket, stream: bytes) -> None:
    # QEMU closes the connection at the first invalid byte, and reports the reason in its event.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await asyncio.get_running_loop().sock_sendall(target, stream)
    target.close()


async def _cancel(monitor: Monitor) -> None:
    """Wait until QEMU has ended an outgoing migration that failed in this process."""
    with contextlib.suppress(WorkloadError, TimeoutError):
        await monitor.execute("migrate_cancel")
        async with asyncio.timeout(_CANCEL_TIMEOUT):
            # The listener is closed, so that the end can only be found by polling.
            while (await monitor.execute("query-migrate")).get("status", "none") not in _ENDED | {"none"}:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def _set_capabilities(states: dict[str, bool]) -> Command:
    items = [{"capability": name, "state": state} for name, state in states.items()]
    return {"execute": "migrate-set-capabilities", "arguments": {"capabilities": items}}


def _set_bandwidth(limit: int) -> Command:
    return {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": limit}}
