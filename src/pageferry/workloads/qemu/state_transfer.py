"""Saving and loading the device state of a QEMU guest: everything but its memory."""

from __future__ import annotations

from collections.abc import Callable

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host.qmp import Monitor
from pageferry.workloads.qemu import device_state
from pageferry.workloads.qemu.control import QUIT, QemuControl
from pageferry.workloads.qemu.run_state import LastSeen
from pageferry.workloads.qemu.snapshot import Snapshot


class StateTransfer:
    """Device state of one guest. `last_words`: as for `Vcpus`."""

    def __init__(self, control: QemuControl, seen: LastSeen, last_words: Callable[[], str]) -> None:
        self.name = seen.name
        self._control = control
        self._seen = seen
        self._last_words = last_words
        self._loading: device_state.Loading | None = None
        """Listener for the device state, until `load`."""

    async def save(self) -> bytes:
        """Return the device state of the paused guest, saved by QEMU's own migration or by a snapshot without memory.

        Raises WorkloadError with QEMU's message. The guest can be resumed in either case.
        """
        was_running = not self._control.stays_paused
        async with self._control.session() as monitor:
            await self._control.prepare_state(monitor)
            stream = await (device_state.save(monitor) if was_running else self._save_snapshot(monitor))
            await self._seen.saved(monitor)
        return device_state.SavedState(machine=self._seen.machine.type, was_running=was_running, stream=stream).encode()

    async def prepare_load(self) -> None:
        """Let a guest started with `incoming` listen for its state, which saves about 5 ms in `load`.

        Raises UnsupportedError if QEMU cannot load its state alone, WorkloadError.
        """
        if self._loading is None:
            monitor = await self._control.hold()
            await self._control.prepare_state(monitor, incoming=True)
            self._loading = await device_state.Loading.begin(monitor)

    async def load(self, state: bytes) -> None:
        """Load a device state into a guest started with `incoming`. The guest stays paused, and ends with this process
        until `commit`.

        Raises WorkloadError, with QEMU's message, if the state does not match this machine or the guest could not run
        with it; WorkloadDied.
        """
        saved = device_state.SavedState.decode(state)
        if saved.machine != self._seen.machine.type:
            raise WorkloadError(
                f"cannot load the state of a {saved.machine} machine: {self.name} is a {self._seen.machine.type}; "
                f"start it with -machine {saved.machine}, and with the same devices"
            )
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
        """Prepare for `load`. Until then the guest has no state, and ends with this process."""
        self._control.start_guardian()
        self._control.plan([QUIT])
        async with self._control.session(keep=at_once) as monitor:
            await self._control.prepare_state(monitor, incoming=True)

    def close(self) -> None:
        """Stop listening for the device state."""
        if self._loading is not None:
            self._loading.close()
            self._loading = None

    async def _save_snapshot(self, monitor: Monitor) -> bytes:
        snapshot = Snapshot()
        self._control.plan_to_restore(first=snapshot.removal)
        stream = await snapshot.save(monitor)
        self._control.plan_to_restore()
        return stream
