"""Unmodified QEMU guests as workloads: started under management, or adopted.

Guest memory is a shared file that QEMU and pageferry both map. QMP does the rest: `stop` and `cont` pause and resume
the guest, and QEMU's own migration saves and loads the device state (`device_state`).
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
from pageferry.host import proc, processes
from pageferry.host.blocking import in_thread
from pageferry.host.qmp import TIMEOUT
from pageferry.host.registry import Registry
from pageferry.memory import mappers
from pageferry.memory.regions import Identity, Region
from pageferry.memory.view import Memory
from pageferry.workloads.protocols import Condition, Faults, Migratable, OwnershipRecord, StateSink
from pageferry.workloads.qemu import direct_io, disks, kvm_prefault, opening, process, run_state
from pageferry.workloads.qemu.control import QUIT, Changes, QemuControl
from pageferry.workloads.qemu.kvm_prefault import VirtualMachine
from pageferry.workloads.qemu.opening import Opened, StartArguments, StartOptions
from pageferry.workloads.qemu.run_state import LastSeen
from pageferry.workloads.qemu.state_transfer import StateTransfer
from pageferry.workloads.qemu.vcpus import Vcpus

_QUIT_TIMEOUT = 10.0
"""Seconds for QEMU to exit after `quit`: it closes its disks first."""

_ANSWER_TIMEOUT = 0.5
"""Seconds for QEMU to reply to `quit`. It replies before it closes its disks."""

log = logging.getLogger(__name__)


class QemuWorkload:
    """QEMU guest. Made by `start`, `attach` or `adopt`; several objects, in several processes, can refer to one guest.

    The monitor is held from `pause` (or `load_state`) to `resume` or `discard`: see `control`.
    """

    def __init__(self, opened: Opened) -> None:
        self.name = opened.folder.name
        self._folder = opened.folder
        self._entry = opened.entry
        self._regions = opened.regions
        self._child = opened.child
        self._control = QemuControl(self.name, self._entry.qmp_socket)
        self._seen = LastSeen(self.name, opened.machine, ran=opened.ran)
        self._last_words = functools.partial(process.quoted, self._folder.path / opening.LOG)
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
        """Return the guest of that name, regardless of the process that started it. `timeout`: seconds to wait for its
        monitor.

        Raises NoSuchWorkload, also if the name belongs to another kind of workload, WorkloadError, WorkloadDied.
        """
        return cls(await opening.find(name, registry or Registry(), timeout))

    @classmethod
    async def adopt(cls, name: str, qmp_socket: str, *, registry: Registry | None = None) -> Self:
        """Manage, as `name`, a running QEMU with its memory in a shared file that another process has started.

        Raises UnsupportedError, with the options that it should have been started with, NameInUse, WorkloadError.
        """
        folder = (registry or Registry()).claim(name)
        with opening.released_on_error(folder):
            return cls(await opening.register(folder, os.path.join(os.getcwd(), qmp_socket), None))

    # -- the workload protocol

    @property
    def identity(self) -> Identity:
        """Kind, name, and details: `qemu` (its version), `machine` (type with version), `cpus`, `devices`, and of the
        CPU `cpu` (model), `cpu-signature`, `cpu-features`."""
        return Identity("qemu", self.name, self._seen.machine.details)

    def check_source(self, details: Mapping[str, Any]) -> None:
        """Raise WorkloadError, with the reason, if a guest with these details cannot be received on this host."""
        self._seen.machine.check_source(details, "the source", f"{self.name} at the destination")

    def check_image(self, details: Mapping[str, Any], path: str) -> None:
        """Raise WorkloadError, with the reason, if a guest with the details of an image cannot run on this host."""
        self._seen.machine.check_source(details, path, self.name)

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
        """Process id of the guardian, which acts if this process exits; None while none is needed."""
        return self._control.guardian

    @property
    def log(self) -> Path | None:
        """Output of a detached QEMU; None if it is on a terminal, or adopted."""
        path = self._folder.path / opening.LOG
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
        """Do the part of `pause` that is possible while the guest runs, about 50 ms of work; `pause` does it if
        necessary.

        Raises UnsupportedError if QEMU cannot save its state alone, WorkloadError.
        """
        await self._vcpus.prepare()
        files = await in_thread(direct_io.direct_files, self.pid, self.name)
        await direct_io.await_requests(self.pid, files, self.name)

    async def pause(self) -> None:
        """Stop the vCPUs (QMP `stop`), and determine the run state and the machine.

        A guest that is already paused, also one that another client has paused since, stays paused in `resume`. Until
        `commit`, a guardian resumes the guest if this process exits.

        Raises WorkloadError if the guest has shut down since the last check and cannot run without a reset.
        """
        await self._vcpus.pause()

    async def pause_to_save(self, sink: StateSink) -> float:
        """Pause as `pause` does, by QEMU's own migration of the device state, which `save_state` completes.

        `sink` receives the beginning of what `save_state` will return, from before the vCPUs stop. A guest that is
        already paused is saved by `save_state` alone. Return when QEMU stopped the vCPUs. Raises as `pause`.
        """
        started = time.perf_counter()
        await self._vcpus.pause(functools.partial(self._state.stop_to_save, sink))
        return max(started, self._state.stopped_at)

    async def does_direct_io(self) -> bool:
        """Return whether QEMU has a disk open whose reads may pin guest memory. Raises UnsupportedError,
        WorkloadDied."""
        return bool(await in_thread(direct_io.direct_files, self.pid, self.name))

    async def drain(self) -> float | None:
        """Wait for the disk requests that write to guest memory directly, in a short pause (`stop`, `cont`).

        `stop` is the only command of QEMU that is documented to wait for all requests. A guardian resumes the guest if
        this process exits during the pause.
        """
        return await self._vcpus.drain()

    async def commit(self, record: OwnershipRecord | None = None) -> None:
        """Commit the paused guest: it may run at the destination from now on, and stays paused even if this process
        exits.

        With a `record`, the guardian reads that file if this process exits, and then resumes the guest or ends it.
        Raises WorkloadDied, and WorkloadError if another client has changed the guest since its state was saved or
        loaded.
        """
        monitor = await self._control.hold()
        if record is None:
            await self._seen.check_unchanged(monitor)
            self._control.plan([])
            if self._control.stays_paused:
                # The destination opens the disks before this QEMU exits. For a running guest, `save_state` has released
                # them.
                self._control.disks_released = True
                await disks.release(await self._control.hold())
            return
        self._control.plan_by_owner(record)
        # Also checks that QEMU runs: a process that is being killed is still visible in /proc, but does not reply.
        await self._seen.check_unchanged(monitor)

    async def resume(self) -> None:
        """Resume the vCPUs (QMP `cont`), also after `save_state`, unless the guest was already paused before `pause`.

        Raises WorkloadError if the guest does not run afterwards; WorkloadDied, with `never_ran` if QEMU cannot have
        received `cont`.
        """
        await self._state.cancel_save()
        await self._vcpus.resume()

    @property
    def stays_paused(self) -> bool:
        """Whether another client had paused the guest, so that `resume` leaves it paused."""
        return self._control.stays_paused

    @property
    def changes(self) -> dict[str, Any]:
        """Changes that another process has to undo, with `revert`, if this one exits after `commit`."""
        found: dict[str, Any] = msgspec.to_builtins(self._control.changes)
        return found

    async def revert(self, changes: Mapping[str, Any]) -> None:
        """Undo the changes of the process that committed the guest: restore its run state, running or paused, and the
        migration settings of its user. Empty `changes` are those of an older release: the guest is resumed.

        Raises WorkloadError for invalid changes, and as `resume`.
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
        return await self._state.save()

    async def prepare_load(self) -> None:
        """Let a guest started with `incoming` listen for its state, which saves about 5 ms in `load_state`.

        Raises UnsupportedError if QEMU cannot load its state alone, WorkloadError.
        """
        await self._state.prepare_load()

    async def load_ahead(self, piece: bytes) -> None:
        """Load a piece of a state that `pause_to_save` has given to its sink, before memory is complete.

        `load_state` loads the rest. Raises WorkloadError if the state is of another machine, WorkloadDied.
        """
        await self._state.load_ahead(piece)

    async def load_state(self, state: bytes) -> None:
        """Load a device state into a guest started with `incoming`. The guest stays paused, and ends with this process
        until `commit`.

        Raises WorkloadError, with QEMU's message, if the state does not match this machine or the guest could not run
        with it; WorkloadDied.
        """
        await self._state.load(state)

    async def prefault(self, units: Mapping[int, Sequence[int]] | None = None) -> int:
        """Populate KVM's page tables, if the guest runs on KVM and the kernel supports it (see `kvm_prefault`). Return
        the bytes mapped.

        Raises OSError with the kernel's reason, WorkloadError, WorkloadDied.
        """
        machine = VirtualMachine.find(self.pid)
        if machine is None:
            return 0
        async with self._control.session() as monitor:
            return await kvm_prefault.prefault(monitor, machine, self._regions, units)

    async def quit(self, answer: float = _ANSWER_TIMEOUT) -> bool:
        """Let QEMU exit (QMP `quit`). Return False if it does not reply within `answer` seconds, or exit within 10 s
        after."""
        self._control.plan([])
        try:
            async with asyncio.timeout(answer), self._control.session() as monitor:
                await monitor.run(QUIT)
        except WorkloadError:
            pass  # it has exited, or is exiting
        except TimeoutError:
            return False
        self._state.close()
        self._control.abandon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUIT_TIMEOUT):
                await processes.wait_for_end(self.pid, self._entry.started)
        return not self._entry.alive

    async def discard(self) -> None:
        """End QEMU (QMP `quit`, or else SIGKILL), and remove the workload."""
        if not await self.quit():
            log.warning("%s: process %d has not exited after `quit`, and is killed", self.name, self.pid)
            self._state.close()
            self._control.abandon()
            processes.send_signal(self.pid, self._entry.started, signal.SIGKILL)
            await processes.wait_for_end(self.pid, self._entry.started)
        await self.forget()

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
            raise WorkloadDied(f"{self.name} (process {self.pid}) has ended{self._last_words()}")
        async with self._control.session() as monitor:
            return str((await monitor.execute("query-status"))["status"])

    def faults(self) -> Faults:
        """Return the page faults of the vCPU threads. Raises WorkloadDied if QEMU has exited."""
        ours = proc.inner_threads(self.pid)
        vcpus = {ours[thread] for thread in self._seen.machine.vcpu_threads if thread in ours}
        return Faults(*proc.thread_faults(self.pid, vcpus))

    def close(self) -> None:
        """Release the guest: resume it if this process has paused and not committed it; end it if it waits for a
        state."""
        for region in self._regions:
            os.close(region.fd)
        self._regions = ()
        self._state.close()
        self._control.abandon()

    # -- exit

    async def ended(self) -> int | None:
        """Wait until QEMU has exited. Return its exit code (-N for signal N) if it is a child of this process,
        otherwise None. See also `forget`."""
        if self._child is not None:
            return await self._child.wait()
        await processes.wait_for_end(self.pid, self._entry.started)
        return None

    async def died(self) -> NoReturn:
        """Wait until QEMU has exited, then raise WorkloadDied with its message."""
        await self.ended()
        raise WorkloadDied(f"{self.name} (process {self.pid}) ended while it waited for its source{self._last_words()}")

    async def forget(self) -> None:
        """Close the files of this object, and remove name, log and records, after QEMU has exited."""
        if self._child is not None:
            await self._child.wait()
        self.close()
        self._folder.release()
