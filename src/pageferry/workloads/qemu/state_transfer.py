"""Saving and loading of the device state of a QEMU guest, by its own migration or by a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.workloads.protocols import StateSink
from pageferry.workloads.qemu import device_state, run_state
from pageferry.workloads.qemu.control import QUIT, QemuControl
from pageferry.workloads.qemu.run_state import LastSeen, Stopped
from pageferry.workloads.qemu.snapshot import Snapshot


class StateTransfer:
    """Device state of one guest. `last_words`: as in `Vcpus`."""

    def __init__(self, control: QemuControl, seen: LastSeen, last_words: Callable[[], str]) -> None:
        self.name = seen.name
        self._control = control
        self._seen = seen
        self._last_words = last_words
        self._loading: device_state.Loading | None = None
        """Connection over which QEMU loads the device state; None before `prepare_load` and after `load`."""
        self._beginning: bytearray | None = bytearray()
        """Beginning of the state to load, while its header is incomplete; None afterwards."""
        self._saving: device_state.Saving | None = None
        """QEMU's migration of the device state, from `stop_to_save` to the end of `save`."""
        self.stopped_at = 0.0
        """Time at which QEMU stopped the vCPUs for the last migration, on the clock of `time.perf_counter`."""
        self._sent_ahead = False
        """Whether a sink has received the beginning of the state."""

    async def stop_to_save(self, sink: StateSink, monitor: Monitor) -> Stopped:
        """Stop the vCPUs by QEMU's migration of the device state.

        `sink` receives the beginning of the result of `save`, except for a guest that is already paused.
        """
        if not await run_state.runs(monitor):
            return await run_state.stop(monitor)
        self._sent_ahead = True
        await sink(device_state.Header(machine=self._seen.machine.type, was_running=True).encode())
        self._saving = await device_state.Saving.begin(monitor, sink)
        stopped_at = await self._saving.stopped()
        self.stopped_at = stopped_at or 0.0
        return Stopped(False) if stopped_at is None else Stopped(True, run_state.FINISHING)

    async def save(self) -> bytes:
        """Return the device state of the paused guest, saved by QEMU's own migration or by a snapshot without memory.

        Raises WorkloadError with QEMU's message. The guest can be resumed in either case.
        """
        was_running = not self._control.stays_paused
        if self._sent_ahead and not was_running:
            raise WorkloadError(
                f"cannot save {self.name}: another client paused it, or it shut down, just before the pause; it "
                "stays paused; retry"
            )
        async with self._control.session() as monitor:
            await self._control.prepare_state(monitor)
            stream = await (self._save_stream(monitor) if was_running else self._save_snapshot(monitor))
            await self._seen.saved(monitor)
        return device_state.SavedState(machine=self._seen.machine.type, was_running=was_running, stream=stream).encode()

    async def cancel_save(self) -> None:
        """Cancel QEMU's migration of the device state, if it is running."""
        self._sent_ahead = False
        if self._saving is not None:
            saving, self._saving = self._saving, None
            await saving.cancel()

    async def prepare_load(self) -> None:
        """Have a guest started with `incoming` wait for its state, which saves about 5 ms in `load`.

        Raises UnsupportedError if QEMU cannot load its state alone, WorkloadError.
        """
        if self._loading is None:
            monitor = await self._control.hold()
            await self._control.prepare_state(monitor, incoming=True)
            self._loading = await device_state.Loading.begin(monitor)

    async def load_ahead(self, piece: bytes) -> None:
        """Load a piece of a state that a sink has received, before memory is complete. Raises WorkloadError if the
        state belongs to another type of machine, WorkloadDied."""
        if self._beginning is not None:
            self._beginning += piece
            header, length = device_state.Header.decode(bytes(self._beginning))
            if header is None:
                return
            self._check_machine(header.machine)
            piece, self._beginning = bytes(self._beginning[length:]), None
        await self.prepare_load()
        if piece and self._loading is not None:
            self._loading.feed(piece)

    async def load(self, state: bytes) -> None:
        """Load a device state into a guest started with `incoming`. The guest stays paused. Until `commit`, it ends
        with this process.

        Raises WorkloadError, with QEMU's message, if the state does not match this machine or the guest could not run
        with it; WorkloadDied.
        """
        saved = device_state.SavedState.decode(state)
        self._check_machine(saved.machine)
        try:
            await self.prepare_load()
            assert self._loading is not None
            loading, self._loading = self._loading, None
            self._seen.look(await self._control.hold())
            await loading.finish(saved.stream)
        except WorkloadDied as died:
            raise WorkloadDied(f"{self.name} could not load the device state and exited{self._last_words()}") from died
        self._control.stays_paused = self._control.disks_released = not saved.was_running
        await self._seen.loaded(await self._control.hold(), was_running=saved.was_running)

    async def expect(self, at_once: bool) -> None:
        """Set up a guest for `load`, and plan to end it if this process exits. `at_once`: `load` follows soon, so keep
        the monitor open."""
        self._control.start_guardian()
        self._control.plan([QUIT])
        async with self._control.session(keep=at_once) as monitor:
            await self._control.prepare_state(monitor, incoming=True)

    def close(self) -> None:
        """Close the connections to QEMU. A running migration of the device state then fails, and QEMU resumes the
        vCPUs."""
        if self._saving is not None:
            self._saving.close()
            self._saving = None
        if self._loading is not None:
            self._loading.close()
            self._loading = None

    async def _save_stream(self, monitor: Monitor) -> bytes:
        try:
            if self._saving is None:
                self._saving = await device_state.Saving.begin(monitor)
                await self._saving.stopped()
            stream = await self._saving.finish()
        except BaseException:
            await asyncio.shield(self.cancel_save())
            raise
        self._saving, self._sent_ahead = None, False
        return stream

    def _check_machine(self, machine: str) -> None:
        """Raise WorkloadError if a state belongs to another type of machine."""
        if machine != self._seen.machine.type:
            raise WorkloadError(
                f"cannot load the state of a {machine} machine: {self.name} is a {self._seen.machine.type}; "
                f"start it with -machine {machine}, and with the same devices"
            )

    async def _save_snapshot(self, monitor: Monitor) -> bytes:
        snapshot = Snapshot()
        self._control.plan_to_restore(first=snapshot.removal)
        stream = await snapshot.save(monitor)
        self._control.plan_to_restore()
        return stream
