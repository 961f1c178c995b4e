"""Unmodified QEMU guests as workloads: started under management, or adopted.

Guest memory is a shared file that both QEMU and pageferry map. The QMP commands `stop` and `cont` pause and resume the
guest, and QEMU's own migration saves and loads the device state (`device_state`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self, Unpack

import msgspec

from pageferry.errors import WorkloadDied, WorkloadError
from pageferry.host import endings, proc, processes
from pageferry.host.blocking import in_thread
from pageferry.host.qmp import TIMEOUT
from pageferry.host.registry import Registry
from pageferry.memory import mappers
from pageferry.memory.regions import Identity, Region
from pageferry.memory.view import Memory
from pageferry.workloads.protocols import (
    DISKS,
    SHARED,
    Condition,
    Faults,
    Migratable,
    OwnershipRecord,
    SnapshotDetails,
    StateSink,
)
from pageferry.workloads.qemu import (
    awaiting,
    block_devices,
    direct_io,
    disk_comparison,
    disks,
    kvm_prefault,
    opening,
    process,
    run_state,
)
from pageferry.workloads.qemu.control import QUIT, Changes, QemuControl
from pageferry.workloads.qemu.kvm_prefault import VirtualMachine
from pageferry.workloads.qemu.opening import Opened, StartArguments, StartOptions
from pageferry.workloads.qemu.run_state import LastSeen
from pageferry.workloads.qemu.state_transfer import StateTransfer
from pageferry.workloads.qemu.storage import Storage
from pageferry.workloads.qemu.vcpus import Vcpus

_QUIT_TIMEOUT = 10.0
"""Seconds for QEMU to exit after `quit`: it closes its disks first."""

_ANSWER_TIMEOUT = 0.5
"""Seconds for QEMU to reply to `quit`. It replies before it closes its disks."""

log = logging.getLogger(__name__)


class QemuWorkload:
    """QEMU guest. Created by `start`, `attach` or `adopt`. Several objects, in several processes, can refer to one
    guest.

    The monitor is kept open from `pause` (or `load_state`) until `resume` or `discard`: see `control`.
    """

    def __init__(self, opened: Opened) -> None:
        self.name = opened.folder.name
        self._folder = opened.folder
        self._entry = opened.entry
        self._regions = opened.regions
        self._storage = Storage(self._entry.pid)
        self._child = opened.child
        self._handed_over = False
        """Whether this process has committed the guest to a destination."""
        self._control = QemuControl(self.name, self._entry.qmp_socket)
        self._seen = LastSeen(self.name, opened.machine, ran=opened.ran)
        self._last_words = functools.partial(process.quoted, self._folder.path / endings.LOG)
        self._vcpus = Vcpus(self.pid, self._control, self._seen, self._last_words)
        self._state = StateTransfer(self._control, self._seen, self._last_words)

    # -- start, attach, adopt

    @classmethod
    async def start(
        cls,
        name: str,
        arguments: Sequence[str],
        *,
        registry: Registry | None = None,
        **options: Unpack[StartArguments],
    ) -> Self:
        """Start a QEMU from the user's command line, program first, with its memory in a shared file.

        `options` are the fields of `opening.StartOptions`. A failed start leaves no process and no file behind.

        Raises UsageError, UnsupportedError for options that cannot be managed, NameInUse, WorkloadError with QEMU's
        message.
        """
        chosen = StartOptions(**options)
        command = opening.parse(name, arguments, chosen)
        folder = (registry or Registry()).claim(name)
        with opening.released_on_error(folder):
            if chosen.incoming:
                awaiting.begin(folder)
            child, path = opening.launch(folder, command, chosen)
            try:
                workload = cls(await opening.register(folder, path, child))
                if chosen.incoming:
                    await workload._state.expect(chosen.at_once)
                return workload
            except BaseException:
                child.kill()
                raise

    @classmethod
    async def attach(cls, name: str, *, registry: Registry | None = None, timeout: float = TIMEOUT) -> Self:
        """Return the guest with this name, regardless of the process that started it. `timeout`: seconds to wait for
        the monitor of the guest.

        Raises NoSuchWorkload if no guest has this name, WorkloadError, WorkloadDied.
        """
        return cls(await opening.find(name, registry or Registry(), timeout))

    @classmethod
    async def adopt(cls, name: str, qmp_socket: str, *, registry: Registry | None = None) -> Self:
        """Manage a running QEMU, started by another process, as the workload `name`. Its memory must be in a shared
        file.

        Raises UnsupportedError, with the options that QEMU must be started with, NameInUse, WorkloadError.
        """
        folder = (registry or Registry()).claim(name)
        with opening.released_on_error(folder):
            return cls(await opening.register(folder, os.path.join(os.getcwd(), qmp_socket), None))

    # -- the workload protocol

    @property
    def identity(self) -> Identity:
        """Kind, name, and details: `qemu` (its version), `machine` (type with version), `cpus`, `devices`, `cpu`
        (model), `cpu-signature`, `cpu-features`, `disks` (see `block_devices`)."""
        machine = self._seen.machine
        return Identity("qemu", self.name, machine.details | self._storage.details(machine.block_devices or ()))

    async def check_source(self, details: Mapping[str, Any]) -> None:
        """Raise WorkloadError, with the reason, if a guest with these details cannot be received on this host.

        The disks of both sides must be the same, unless the source has set the detail `disks-shared`.
        """
        here = f"{self.name} at the destination"
        self._seen.machine.check_source(details, "the source", here)
        await self.update_details()
        disk_comparison.check_migration(
            block_devices.decode(details),
            self._storage.record(self._seen.machine.block_devices or ()),
            here,
            shared=details.get(SHARED) is True,
        )

    async def check_image(self, details: Mapping[str, Any], path: str, *, disks_as_is: bool = False) -> None:
        """Raise WorkloadError, with the reason, if a guest with the details of an image cannot run on this host.

        Raises DisksDiffer if the disks have changed since the image was written, or if this cannot be determined.
        `disks_as_is`: accept any contents of the disks.
        """
        self._seen.machine.check_source(details, path, self.name)
        await self.update_details()
        devices, recorded = self._seen.machine.block_devices or (), block_devices.decode(details)
        record = self._storage.record_now(devices)
        if recorded is not None:
            empty = self._storage.empty_overlays(devices)
            record = disk_comparison.without_overlays(record, empty, recorded)
        disk_comparison.check_restore(recorded, record, path, self.name, as_is=disks_as_is)

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        return self._entry.pid

    @property
    def qmp_socket(self) -> str:
        """Path of QEMU's monitor socket."""
        return self._entry.qmp_socket

    @property
    def guardian(self) -> int | None:
        """Process id of the guardian, which executes the cleanup plan if this process exits; None while there is no
        guardian."""
        return self._control.guardian

    @property
    def log(self) -> Path | None:
        """Path of the log of a detached QEMU; None if QEMU uses a terminal, or was adopted."""
        path = self._folder.path / endings.LOG
        return path if path.exists() else None

    @property
    def regions(self) -> tuple[Region, ...]:
        """Guest memory, one region per memory backend, named like QEMU's ramblocks."""
        return self._regions

    @property
    def live(self) -> Migratable:
        """This guest, which can be saved while it runs."""
        return self

    @property
    def registered(self) -> bool:
        """True: every guest has a name on this host."""
        return True

    @property
    def pager(self) -> None:
        """None: another process loads deferred contents."""

    @property
    def handed_out(self) -> bool:
        """False: the file of a guest is not handed out to other processes."""
        return False

    def open_memory(self) -> Memory:
        """Map the memory of the guest. Raises WorkloadDied, WorkloadError."""
        return Memory(self)

    async def check_mappers(self) -> None:
        """Raise WorkloadError if another process maps the guest's memory for writing (see `mappers`)."""
        await in_thread(lambda: mappers.refuse_strangers(self.name, self._regions))

    async def prepare_pause(self) -> None:
        """Do the part of `pause` that is possible while the guest runs, which takes about 50 ms. If this is not called,
        `pause` does it.

        Raises UnsupportedError if QEMU cannot save its state alone, WorkloadError.
        """
        await self._vcpus.prepare()
        await self.update_details()
        files = await in_thread(direct_io.direct_files, self.pid, self.name)
        await direct_io.await_requests(self.pid, files, self.name)

    async def pause(self) -> None:
        """Stop the vCPUs (QMP `stop`), and determine the run state and the machine.

        If another client has already paused the guest, `resume` leaves it paused. Until `commit`, a guardian resumes
        the guest if this process exits.

        Raises WorkloadError if the guest has shut down since the last check and cannot run without a reset.
        """
        await self._vcpus.pause()
        await self._vcpus.check_machine()

    async def pause_to_save(self, sink: StateSink) -> float:
        """Like `pause`, but stop the vCPUs by QEMU's own migration of the device state, which `save_state` completes.

        `sink` receives the beginning of the result of `save_state`, starting before the vCPUs stop. A guest that is
        already paused is saved by `save_state` alone. Return the time at which QEMU stopped the vCPUs, on the clock of
        `time.perf_counter`. Raises the same errors as `pause`.
        """
        started = time.perf_counter()
        await self._vcpus.pause(functools.partial(self._state.stop_to_save, sink))
        return max(started, self._state.stopped_at)

    async def does_direct_io(self) -> bool:
        """Return whether QEMU has a disk open whose reads may pin guest memory. Raises UnsupportedError,
        WorkloadDied."""
        return bool(await in_thread(direct_io.direct_files, self.pid, self.name))

    async def drain(self) -> float | None:
        """Wait for the disk requests that write to guest memory directly, in a short pause (`stop`, `cont`). Return the
        duration of the pause, seconds, or None if QEMU does no direct I/O.

        `stop` is the only command of QEMU that is documented to wait for all requests. A guardian resumes the guest if
        this process exits during the pause.
        """
        return await self._vcpus.drain()

    async def prepare_commit(self) -> None:
        """Start to read the machine and its disks, which `commit` checks. Later changes are not noticed."""
        self._seen.look(await self._control.hold(), media=True)

    async def commit(self, record: OwnershipRecord | None = None) -> None:
        """Commit the paused guest: it may run at the destination from now on, and stays paused at the source even if
        this process exits.

        The destination passes a `record`: if this process exits, the guardian reads the file, and resumes or ends the
        guest accordingly. Raises WorkloadDied, and WorkloadError if another client has changed the guest since its
        state was saved or loaded.
        """
        monitor = await self._control.hold()
        if record is None:
            await self._seen.check_unchanged(monitor)
            await self._seen.check_machine()
            self._control.plan([])
            self._handed_over = True
            if self._control.stays_paused:
                # The destination opens the disks before this QEMU exits. The disks of a guest that ran have been
                # released by `save_state`.
                self._control.disks_released = True
                await disks.release(await self._control.hold())
            return
        self._control.plan_by_owner(record, awaiting.release(self._folder))
        # Also checks that QEMU runs: a process that is being killed is still visible in /proc, but does not reply.
        await self._seen.check_unchanged(monitor)
        await self._seen.check_machine()

    async def resume(self) -> None:
        """Resume the vCPUs (QMP `cont`), unless the guest was already paused before `pause`. May be called after
        `save_state`.

        Raises WorkloadError if the guest does not run afterwards; WorkloadDied, with `never_ran` if QEMU cannot have
        received `cont`.
        """
        self._handed_over = False
        await self._state.cancel_save()
        await self._vcpus.resume()
        awaiting.end(self._folder)

    @property
    def stays_paused(self) -> bool:
        """Whether `resume` leaves the guest paused, because another client had paused it."""
        return self._control.stays_paused

    @property
    def changes(self) -> dict[str, Any]:
        """Changes that another process must undo with `revert` if this process exits after `commit`."""
        found: dict[str, Any] = msgspec.to_builtins(self._control.changes)
        return found

    async def revert(self, changes: Mapping[str, Any]) -> None:
        """Undo the changes of the process that committed the guest: restore its run state, running or paused, and the
        migration settings of its user. Records of older releases have empty `changes`: the guest is resumed.

        Raises WorkloadError for invalid changes, and the same errors as `resume`.
        """
        if changes:
            try:
                self._control.take_over(msgspec.convert(changes, Changes))
            except msgspec.ValidationError as wrong:
                raise WorkloadError(f"cannot undo the changes of {self.name}: invalid record ({wrong})") from wrong
        await self._control.hold()
        self._control.start_guardian()
        await self.resume()
        await self._control.settled()

    async def save_state(self) -> bytes:
        """Return the device state of the paused guest, saved by QEMU's own migration or by a snapshot without memory.

        Raises WorkloadError with QEMU's message. The guest can be resumed in either case.
        """
        state = await self._state.save()
        await self._vcpus.check_machine()
        return state

    async def update_details(self) -> None:
        """Query the block devices, and find their files. Raises WorkloadError, WorkloadDied."""
        if self._seen.machine.block_devices == ():
            return
        async with self._control.session() as monitor:
            await self._seen.update_media(monitor)
            await self._storage.locate(monitor, self._seen.machine)

    async def note_details(self) -> None:
        """Note the state of the files of all disks, for `snapshot_details`. Call this after `save_state`, which may
        write to these files.

        A guest that stays paused is examined when later writes are certain to be detected.
        """
        await self._storage.note(self._seen.machine.block_devices or (), at_rest=self.stays_paused)

    async def snapshot_details(self) -> SnapshotDetails:
        """Return the record of the disks as of `note_details`, which contains no query, to keep the pause short.

        If another client has changed disks or media since the last query before the pause, the record states that
        the contents of all disks are unknown. Raises WorkloadDied.
        """
        if (noted := self._storage.noted) is None:
            return SnapshotDetails({})
        try:
            await self.update_details()
        except WorkloadDied:
            raise
        except WorkloadError as failed:
            return SnapshotDetails({}, f"the image does not describe the contents of disks: {failed}")
        if self._seen.machine.block_devices != noted.devices:
            return SnapshotDetails({}, disk_comparison.CHANGED)
        return SnapshotDetails({DISKS: block_devices.encode(noted.record)}, disk_comparison.unsaved(noted.record))

    async def prepare_load(self) -> None:
        """Have a guest started with `incoming` wait for its state, which saves about 5 ms in `load_state`.

        Raises UnsupportedError if QEMU cannot load its state alone, WorkloadError.
        """
        await self._state.prepare_load()

    async def load_ahead(self, piece: bytes) -> None:
        """Load a piece of a state that `pause_to_save` has passed to its sink, before memory is complete.

        `load_state` loads the remaining part. Raises WorkloadError if the state is of another machine, WorkloadDied.
        """
        await self._state.load_ahead(piece)

    async def load_state(self, state: bytes) -> None:
        """Load a device state into a guest started with `incoming`. The guest stays paused. Until `commit`, it ends
        with this process.

        Raises WorkloadError, with QEMU's message, if the state does not match this machine or the guest could not run
        with it; WorkloadDied.
        """
        await self._state.load(state)

    def choose_paused(self, paused: bool) -> None:
        """Choose, after `load_state`, whether `resume` leaves the guest paused. The default is the state in which the
        guest was saved. Raises WorkloadError if the guest is to run, and cannot run with its state."""
        if not paused:
            self._seen.check_can_run()
        self._control.stays_paused = self._control.disks_released = paused

    async def prefault(self, units: Mapping[int, Sequence[int]] | None = None) -> int:
        """Populate the second-stage page tables of a KVM guest, if the kernel supports it (see `kvm_prefault`). Return
        the number of bytes mapped.

        Raises OSError with the kernel's reason, WorkloadError, WorkloadDied.
        """
        machine = VirtualMachine.find(self.pid)
        if machine is None:
            return 0
        async with self._control.session() as monitor:
            return await kvm_prefault.prefault(monitor, machine, self._regions, units)

    async def quit(self, answer: float = _ANSWER_TIMEOUT) -> bool:
        """Have QEMU exit (QMP `quit`). Return False if QEMU does not reply within `answer` seconds, or does not exit
        within `_QUIT_TIMEOUT` seconds after the reply."""
        self._control.plan([])
        try:
            async with asyncio.timeout(answer), self._control.session() as monitor:
                await monitor.run(QUIT)
        except WorkloadError:
            pass  # QEMU has exited, or is exiting
        except TimeoutError:
            return False
        self._state.close()
        self._control.abandon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUIT_TIMEOUT):
                await processes.wait_for_end(self.pid, self._entry.started)
        return not self._entry.alive

    async def discard(self) -> None:
        """End QEMU by QMP `quit`, or by SIGKILL if that fails, and remove the workload."""
        if not await self.quit():
            log.warning("%s: process %d has not exited after `quit`, and is killed", self.name, self.pid)
            self._state.close()
            self._control.abandon()
            processes.send_signal(self.pid, self._entry.started, signal.SIGKILL)
            await processes.wait_for_end(self.pid, self._entry.started)
        await self.forget("migrated" if self._handed_over else None)

    async def running(self) -> bool:
        """Return whether the vCPUs run. Raises WorkloadDied if QEMU has exited."""
        return await self.run_state() == "running"

    async def condition(self) -> Condition:
        """Return `running` or `paused`, with the reason unless a client of the monitor has paused the guest. Raises
        WorkloadDied.
        """
        state = await self.run_state()
        return Condition("running" if state == "running" else "paused", run_state.reason(state))

    async def run_state(self) -> str:
        """Return QEMU's run state, such as `running`, `paused`, `postmigrate`. Raises WorkloadDied."""
        if not self._entry.alive:
            raise WorkloadDied(f"{self.name} (process {self.pid}) has exited{self._last_words()}")
        async with self._control.session() as monitor:
            return str((await monitor.execute("query-status"))["status"])

    def faults(self) -> Faults:
        """Return the page faults of the vCPU threads. Raises WorkloadDied if QEMU has exited."""
        ours = proc.inner_threads(self.pid)
        vcpus = {ours[thread] for thread in self._seen.machine.vcpu_threads if thread in ours}
        return Faults(*proc.thread_faults(self.pid, vcpus))

    def close(self) -> None:
        """Release the guest. A guest that this process has paused and not committed is resumed. A guest that waits for
        a state is terminated."""
        for region in self._regions:
            os.close(region.fd)
        self._regions = ()
        self._state.close()
        self._control.abandon()

    # -- exit

    async def ended(self) -> int | None:
        """Wait until QEMU has exited. Return its exit code (-N for signal N) if it is a child of this process,
        otherwise None. `forget` removes the workload afterwards."""
        if self._child is not None:
            return await self._child.wait()
        await processes.wait_for_end(self.pid, self._entry.started)
        return None

    async def died(self) -> NoReturn:
        """Wait until QEMU has exited, then raise WorkloadDied with its message."""
        await self.ended()
        raise WorkloadDied(
            f"{self.name} (process {self.pid}) exited while it waited for its source{self._last_words()}"
        )

    async def forget(self, cause: endings.Cause | None = None) -> None:
        """Close the files of this object, and remove the name, log and records of the workload. QEMU must have
        exited. With a `cause`, keep the log and the exit code, for `pageferry logs` and `pageferry list --all`."""
        code = await self._child.wait() if self._child is not None else None
        self.close()
        record = None
        if cause is not None:
            record = endings.now(self.name, self._entry.kind, self.pid, cause, exact=True, code=code)
        self._folder.release(record)
