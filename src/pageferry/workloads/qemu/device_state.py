"""The device state of a QEMU guest: everything but its memory, saved and loaded by QEMU's own migration.

With the capability `x-ignore-shared` QEMU leaves memory in shared files out of its migration stream; what is left
(CPUs, devices, ROMs, video memory: about 1 MiB) goes through one end of a socket pair that QEMU is given (`getfd`), so
that nothing is left behind by any failure. Checked with QEMU 7.2 and 10.0; newer ones ignore only files with a path,
which ours has.

QEMU's migration changes more than that: it releases the disks of the guest, and the run state becomes `postmigrate`,
from which only `cont` leads back. A guest that is to run next bears that; the state of one that stays paused is saved
by `snapshot`.
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

LARGEST = 512 << 20
"""Bytes of a stream that we are willing to hold: one that is larger has guest memory in it."""

_DESCRIPTOR = "pageferry-state"
_CHUNK = 1 << 20
_UNLIMITED = 1 << 40
"""Bytes per second: the stream goes to the memory of a process next door."""

_NEEDED = ("x-ignore-shared", "events")
_KEPT = frozenset({"dirty-bitmaps", "validate-uuid", "late-block-activate"})
"""Capabilities about what is migrated, not how: they stay as the user has set them."""

_ENDED = frozenset({"completed", "failed", "cancelled"})
_CANCEL_TIMEOUT = 5.0

_LATE_ACTIVATION = "late-block-activate"
"""Capability of an incoming QEMU: `cont` opens and locks the disks, not the end of the stream. Without it QEMU before
10.0 holds the locks of shared disks before the source has committed, and the source cannot continue."""

T = TypeVar("T")


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """What `QemuWorkload.save_state` gives and `load_state` takes, as MessagePack."""

    version: int = 1
    machine: str
    """Machine type with its version, such as `pc-i440fx-7.2`: the other end must be the same."""
    was_running: bool
    """Whether the guest ran before it was paused: one that its user had stopped stays stopped at the other end."""
    stream: bytes
    """QEMU's migration stream."""

    def encode(self) -> bytes:
        """As bytes."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> SavedState:
        """From bytes. Raises WorkloadError when they are no saved state of a version we know."""
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
    """Commands with which QEMU migrates device state alone, plainly and fast, and those that put its settings back."""

    apply: list[Command]
    undo: list[Command]


async def plan(monitor: Monitor, *, incoming: bool = False) -> Settings:
    """Settings for saving, or with `incoming` for loading; nothing is changed yet.

    Raises UnsupportedError if QEMU lacks a capability that is needed, WorkloadError.
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
    """The migration stream of a guest that has been stopped, with the settings of `plan`. `cont` lets it run again,
    also after a failure.

    Raises WorkloadError with QEMU's words when it cannot be saved, WorkloadDied.
    """
    with await _channel(monitor) as ours:
        try:
            return await _run(monitor, "migrate", _receive(ours))
        except BaseException:
            ours.close()
            await asyncio.shield(_cancel(monitor))
            raise


class Loading:
    """A QEMU that waits for a device state on a connection of ours. Made by `begin`; `finish` or `close` it."""

    def __init__(
        self, monitor: Monitor, ours: socket.socket, events: EventListener, held: contextlib.ExitStack
    ) -> None:
        self._monitor = monitor
        self._ours = ours
        self._events = events
        self._held = held

    @classmethod
    async def begin(cls, monitor: Monitor) -> Self:
        """For a QEMU started with `-incoming defer`, after `plan` was applied. Raises WorkloadError, WorkloadDied."""
        with contextlib.ExitStack() as held:
            ours = held.enter_context(await _channel(monitor))
            events = held.enter_context(monitor.events("MIGRATION"))
            await monitor.execute("migrate-incoming", uri=f"fd:{_DESCRIPTOR}")
            return cls(monitor, ours, events, held.pop_all())

    async def finish(self, stream: bytes) -> None:
        """Give it a migration stream; it stays paused.

        Raises WorkloadError with QEMU's words, or WorkloadDied: some QEMUs end when they cannot take a stream.
        """
        with self._held:
            await _until_ended(self._monitor, self._events, asyncio.ensure_future(_send(self._ours, stream)))

    def close(self) -> None:
        """Hang up."""
        self._held.close()


async def _channel(monitor: Monitor) -> socket.socket:
    """Our end of a socket pair, of which QEMU has been given the other."""
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
    """Start a migration over the descriptor, and run `transfer` beside it until both have ended."""
    moving = asyncio.ensure_future(transfer)
    try:
        with monitor.events("MIGRATION") as events:
            await monitor.execute(command, uri=f"fd:{_DESCRIPTOR}")
            return await _until_ended(monitor, events, moving)
    finally:
        moving.cancel()


async def _until_ended(monitor: Monitor, events: EventListener, moving: asyncio.Future[T]) -> T:
    """The result of a transfer, once QEMU's migration has ended too."""
    ended = asyncio.ensure_future(_end(monitor, events))
    try:
        # The first error ends both: a transfer that fails leaves QEMU waiting for ever, and vice versa.
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
        if not chunk:  # whether this is the end or a failure is said by QEMU's event
            return bytes(data)
        data += chunk
        if len(data) > LARGEST:
            raise WorkloadError(
                f"the device state is larger than {LARGEST >> 20} MiB: guest memory is in it, not in a shared file"
            )


async def _send(target: socket.socket, stream: bytes) -> None:
    # QEMU hangs up at the first byte that it does not like, and says why in its event.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await asyncio.get_running_loop().sock_sendall(target, stream)
    target.close()


async def _cancel(monitor: Monitor) -> None:
    """Wait until an outgoing migration that failed on our side has left QEMU."""
    with contextlib.suppress(WorkloadError, TimeoutError):
        await monitor.execute("migrate_cancel")
        async with asyncio.timeout(_CANCEL_TIMEOUT):
            # Once our listener has gone this is the only way to hear of it.
            while (await monitor.execute("query-migrate")).get("status", "none") not in _ENDED | {"none"}:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def _set_capabilities(states: dict[str, bool]) -> Command:
    items = [{"capability": name, "state": state} for name, state in states.items()]
    return {"execute": "migrate-set-capabilities", "arguments": {"capabilities": items}}


def _set_bandwidth(limit: int) -> Command:
    return {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": limit}}
