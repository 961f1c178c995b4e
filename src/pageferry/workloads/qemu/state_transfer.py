"""Saving and loading of the device state of a guest, by QEMU's own migration or by a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.workloads.protocols import StateSink
from pageferry.workloads.qemu import device_state, devices_only, run_state
from pageferry.workloads.qemu.control import QUIT, QemuControl
from pageferry.workloads.qemu.run_state import LastSeen, Stopped
from pageferry.workloads.qemu.snapshot import Snapshot


class MemFds(NamedTuple):
    """Guest memory without a path."""

    pid: int
    """Process id of QEMU."""
    names: frozenset[str]
    """Names of all regions of the guest."""


class StateTransfer:
    """Device state of one guest. `last_words`: as in `Vcpus`. `memfds`: memory without a path (see `devices_only`)."""

    def __init__(
        self, control: QemuControl, seen: LastSeen, last_words: Callable[[], str], memfds: MemFds | None = None
    ) -> None:
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
        self._memfds = memfds
        self._begun: devices_only.Beginning | None = None
        """Beginning of the state of a guest with `memfds`; None before `stop_to_save`."""
        self._sent_ahead = False
        """Whether a sink has received the beginning of the state."""
        self.keeps_disks = False
        """Whether the disks stay open while the state is saved (see `DiskSaving.keeps_disks`)."""
        self._snapshot: Snapshot | None = None
        """Snapshot that `prepare_snapshot` has prepared for `save`."""

    async def prepare_snapshot(self, monitor: Monitor) -> None:
        """Prepare the snapshot of a running guest whose disks stay open, so that the pause is shorter. The snapshot is
        removed when the guest has resumed. Raises UnsupportedError, WorkloadError."""
        if await self._saves_devices_only(monitor):
            return
        self._snapshot = Snapshot()
        self._control.undo_first(self._snapshot.removal)
        await self._snapshot.prepare(monitor)

    async def stop_to_save(self, sink: StateSink, monitor: Monitor) -> Stopped:
        """Stop the vCPUs by QEMU's migration of the device state.

        `sink` receives the beginning of the result of `save`, except for a guest that is already paused.
        """
        if await self._saves_devices_only(monitor):
            self._begun = await devices_only.begin(monitor)
            return await run_state.stop(monitor)
        if not await run_state.runs(monitor):
            return await run_state.stop(monitor)
        self._sent_ahead = True
        await sink(device_state.Header(machine=self._seen.machine.type, was_running=True).encode())
        self._saving = await device_state.Saving.begin(monitor, sink)
        stopped_at = await self._saving.stopped()
        return Stopped(False) if stopped_at is None else Stopped(True, run_state.FINISHING, stopped_at)

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
            if await self._saves_devices_only(monitor):
                stream = await self._save_devices(monitor)
            else:
                by_migration = was_running and not self.keeps_disks
                stream = await (self._save_stream(monitor) if by_migration else self._save_snapshot(monitor))
            await self._seen.saved(monitor)
        return device_state.SavedState(machine=self._seen.machine.type, was_running=was_running, stream=stream).encode()

    async def cancel_save(self) -> None:
        """Cancel QEMU's migration of the device state, if it is running. Forget a prepared snapshot, which the control
        of the guest removes."""
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None
        self._sent_ahead = False
        if self._saving is not None:
            saving, self._saving = self._saving, None
            await saving.cancel()

    async def prepare_load(self) -> None:
        """Have a guest started with `incoming` wait for its state, which saves about 5 ms in `load`.

        Raises UnsupportedError if QEMU cannot load its state alone. Also raises WorkloadError.
        """
        if self._loading is None:
            monitor = await self._control.hold()
            await self._control.prepare_state(monitor, incoming=True)
            self._loading = await device_state.Loading.begin(monitor)

    async def load_ahead(self, chunk: bytes) -> None:
        """Load a chunk of a state that a sink has received, before memory is complete. Raises WorkloadError if the
        state belongs to another type of machine, WorkloadDied."""
        if self._beginning is not None:
            self._beginning += chunk
            header, length = device_state.Header.decode(bytes(self._beginning))
            if header is None:
                return
            self._check_machine(header.machine)
            chunk, self._beginning = bytes(self._beginning[length:]), None
        await self.prepare_load()
        if chunk and self._loading is not None:
            self._loading.feed(chunk)

    async def load(self, state: bytes) -> None:
        """Load a device state into a guest started with `incoming`. The guest stays paused. Until `commit`, it ends
        with this process.

        Raises WorkloadError, with QEMU's message, if the state does not match this machine or the guest could not run
        with it. Raises WorkloadDied if QEMU exits.
        """
        saved = device_state.SavedState.decode(state)
        self._check_machine(saved.machine)
        try:
            await self.prepare_load()
            assert self._loading is not None
            loading, self._loading = self._loading, None
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
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None
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

    async def _saves_devices_only(self, monitor: Monitor) -> bool:
        """Return whether the state has to be saved by `devices_only`, because QEMU would save the memory of the guest
        too."""
        return self._memfds is not None and await devices_only.can_save(monitor)

    async def _save_devices(self, monitor: Monitor) -> bytes:
        assert self._memfds is not None
        begun, self._begun = self._begun or await devices_only.begin(monitor), None
        return await devices_only.save(monitor, self._memfds.pid, begun, self._memfds.names)

    async def _save_snapshot(self, monitor: Monitor) -> bytes:
        prepared, snapshot = self._snapshot is not None, self._snapshot or Snapshot()
        self._control.plan_to_restore(first=[snapshot.dismissal, *([] if prepared else snapshot.removal)])
        try:
            if not prepared:
                await snapshot.prepare(monitor)
            stream = await snapshot.save(monitor)
        finally:
            if not prepared:
                await snapshot.remove(monitor)
        self._control.plan_to_restore()
        return stream
