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
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack

import msgspec

from pageferry.errors import UnsupportedError, WorkloadDied, WorkloadError
from pageferry.host import endings, proc, processes
from pageferry.host.blocking import in_thread
from pageferry.host.qmp import TIMEOUT
from pageferry.host.registry import Registry
from pageferry.memory import mappers
from pageferry.memory.regions import Identity, Region
from pageferry.memory.view import Memory
from pageferry.workloads.protocols import (
    Condition,
    Faults,
    Migratable,
    OwnershipRecord,
    SnapshotDetails,
    StateSink,
)
from pageferry.workloads.qemu import (
    announcement,
    awaiting,
    direct_io,
    disks,
    generation_id,
    kvm_prefault,
    opening,
    process,
    ram,
    rtc,
    run_state,
)
from pageferry.workloads.qemu.control import QUIT, Changes, QemuControl
from pageferry.workloads.qemu.guest_disks import GuestDisks
from pageferry.workloads.qemu.kvm_prefault import VirtualMachine
from pageferry.workloads.qemu.opening import Opened
from pageferry.workloads.qemu.run_state import LastSeen
from pageferry.workloads.qemu.state_transfer import MemFds, StateTransfer
from pageferry.workloads.qemu.vcpus import Vcpus

_QUIT_TIMEOUT = 10.0
"""Maximum time for QEMU to exit after `quit`, seconds. QEMU closes its disks first."""

_BASE_NAME = "pageferry-base"
"""Name of the descriptor of the base in QEMU."""

_ANSWER_TIMEOUT = 0.5
"""Maximum time for QEMU to reply to `quit`, seconds. QEMU replies before it closes its disks."""

if TYPE_CHECKING:  # imported by the methods that use them: most commands do not
    from pageferry.pager.base_records import CloneRecord
    from pageferry.pager.launcher import PagerConnection
    from pageferry.pager.orders import BaseOpened
    from pageferry.workloads.qemu.libvirt import Domain
    from pageferry.workloads.qemu.starting import StartArguments

log = logging.getLogger(__name__)


class QemuWorkload(GuestDisks):
    """QEMU guest. `start`, `attach` and `adopt` return an instance. Several objects, in several processes, can refer to
    one guest.

    The monitor is kept open from `pause` (or `load_state`) until `resume` or `discard`: see `control`.
    """

    def __init__(self, opened: Opened) -> None:
        super().__init__(opened.entry.pid)
        self.name = opened.folder.name
        self._folder = opened.folder
        self._entry = opened.entry
        self._regions = opened.regions
        self._clone = opened.clone
        self._rtc_clock = rtc.clock_of_process(self._entry.pid)
        self._child = opened.child
        self._handed_over = False
        """Whether this process has committed the guest to a destination."""
        self._control = QemuControl(self.name, self._entry.qmp_socket)
        self._seen = LastSeen(self.name, opened.machine, ran=opened.ran)
        self._last_words = functools.partial(process.quoted, self._folder.path / endings.LOG)
        self._vcpus = Vcpus(self.pid, self._control, self._seen, self._last_words)
        self._memfds = self._find_memfds()
        self._state = StateTransfer(self._control, self._seen, self._last_words, self._memfds)

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

        `options` are the fields of `starting.StartOptions`. A failed start leaves no process and no file behind.

        Raises UsageError, UnsupportedError for options that cannot be managed, NameInUse, WorkloadError with QEMU's
        message.
        """
        from pageferry.workloads.qemu import starting

        chosen = starting.StartOptions(**options)
        command = starting.parse(name, arguments, chosen)
        folder = (registry or Registry()).claim(name)
        with starting.released_on_error(folder):
            if chosen.incoming:
                awaiting.begin(folder)
            child, path = starting.launch(folder, command, chosen)
            try:
                workload = cls(await starting.register(folder, path, child))
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

        Raises NoSuchWorkload if no guest has this name, WorkloadDied if its QEMU has exited. Also raises WorkloadError.
        """
        return cls(await opening.find(name, registry or Registry(), timeout))

    @classmethod
    async def adopt(
        cls, name: str, qmp_socket: str, *, domain: Domain | None = None, registry: Registry | None = None
    ) -> Self:
        """Manage a running QEMU, started by another process, as the workload `name`. Its memory must be in a shared
        file. `domain`: domain of libvirt that the socket must belong to.

        Raises UnsupportedError, with the options that QEMU must be started with, NameInUse, WorkloadError.
        """
        from pageferry.workloads.qemu import starting

        folder = (registry or Registry()).claim(name)
        with starting.released_on_error(folder):
            return cls(await starting.register(folder, os.path.join(os.getcwd(), qmp_socket), expected=domain))

    # -- the workload protocol

    @property
    def identity(self) -> Identity:
        """Kind, name, and details: `qemu` (its version), `machine` (type with version), `cpus`, `devices`, `cpu`
        (model), `cpu-signature`, `cpu-features`, `generation-id` if the guest has one, `rtc-clock`, `disks` (see
        `block_devices`)."""
        machine = self._seen.machine
        clock = {rtc.DETAIL: self._rtc_clock}
        return Identity("qemu", self.name, machine.details | clock | self._storage.details(machine.block_devices or ()))

    @property
    def generation_id(self) -> str | None:
        """GUID of the guest, in lower case; None without the device `vmgenid`."""
        return self._seen.machine.generation_id

    async def check_source(self, details: Mapping[str, Any]) -> None:
        """Raise WorkloadError, with the reason, if a guest with these details cannot be received on this host.

        The disks of both sides must be the same, unless the source has set the detail `disks-shared`, or copies them
        (`disks-copied`).
        """
        here = f"{self.name} at the destination"
        self._seen.machine.check_source(details, "the source", here)
        generation_id.check_migration(details, self.generation_id, here)
        rtc.check_migration(details, self._rtc_clock, here)
        await self.update_details()
        self._check_source_disks(details, here)

    async def check_image(self, details: Mapping[str, Any], path: str, *, disks_as_is: bool = False) -> None:
        """Raise WorkloadError, with the reason, if a guest with the details of an image cannot run on this host.

        Raises DisksDiffer if the disks have changed since the image was written, or if this cannot be determined.
        `disks_as_is`: accept any contents of the disks.
        """
        self._seen.machine.check_source(details, path, self.name)
        rtc.check_restored(details, self._rtc_clock, path)
        await self.update_details()
        self._check_image_disks(details, path, as_is=disks_as_is)

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
        """Guest memory, one region per memory backend, with the name of QEMU's ramblock.

        Raises UnsupportedError for a clone: its memory is not in a file of the guest, and a reader of the base would
        miss the guest's private pages.
        """
        if self._clone is not None:
            raise UnsupportedError(
                f"cannot access the memory of {self.name} for this operation: it is a clone, which shares the memory "
                f"of {self._clone.image}; save it, and restore that image with `--memory own`"
            )
        return self._regions

    @property
    def clone(self) -> CloneRecord | None:
        """Record of a guest that shares the memory of its image; None for any other guest."""
        return self._clone

    async def receive_base(self, descriptor: int) -> None:
        """Pass a descriptor of a base to QEMU, which keeps it open. Raises WorkloadError, WorkloadDied."""
        async with self._control.session() as monitor:
            await monitor.give_descriptor(_BASE_NAME, descriptor)

    async def share_base(self, pager: PagerConnection, opened: BaseOpened, work: CloneRecord) -> None:
        """Replace the memory of this guest, which waits for its state, by private pages over an opened base (see
        `CanShareBase`)."""
        from pageferry.pager import base_client, base_records
        from pageferry.workloads.qemu.command_line import BACKEND

        if any(region.name != BACKEND for region in self._regions):  # no other process can map pageferry's own file
            await self.check_mappers()
        descriptor = base_client.open_file(opened, work.image)
        try:
            await self.receive_base(descriptor)
        finally:
            os.close(descriptor)
        await pager.share(self.name, work)
        self.become_clone(base_records.clone_record(self._folder) or work)

    def become_clone(self, record: CloneRecord) -> None:
        """Record that the memory of the guest is private pages over a base, and discard the file of QEMU."""
        for region in self._regions:
            length = os.fstat(region.fd).st_size
            os.ftruncate(region.fd, 0)
            os.ftruncate(region.fd, length)
        self._clone = record

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

    def check_migratable(self) -> None:
        """Raise UnsupportedError if libvirt manages the guest, or if its memory has no path."""
        if self._entry.domain is not None:
            from pageferry.workloads.qemu import libvirt

            libvirt.refuse_migration(self.name, self._entry.domain)
        if self._memfds is not None:
            raise UnsupportedError(
                f"cannot migrate {self.name}: its memory is a memfd, which QEMU would migrate too; use a "
                "memory-backend-file, or a checkpoint"
            )

    def _find_memfds(self) -> MemFds | None:
        """Return the names of the regions if any of them is a memfd, otherwise None."""
        if not any(map(ram.is_memfd, self._regions)):
            return None
        return MemFds(self.pid, frozenset(region.name for region in self._regions))

    def open_memory(self) -> Memory:
        """Map the memory of the guest. Raises WorkloadDied, WorkloadError."""
        return Memory(self)

    async def check_mappers(self) -> None:
        """Raise WorkloadError if another process maps the guest's memory for writing (see `mappers`). The pages of a
        clone are private to QEMU."""
        if self._clone is not None:
            return
        await in_thread(lambda: mappers.refuse_strangers(self.name, self._regions))

    async def prepare_pause(self) -> None:
        """Do the part of `pause` that is possible while the guest runs, which takes about 50 ms. If this method is not
        called, `pause` does that part.

        Raises UnsupportedError if QEMU cannot save its state alone. Also raises WorkloadError.
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
        """Pause as `pause` does, but by QEMU's own migration of the device state, which `save_state` completes.

        `sink` receives the beginning of the result of `save_state`, starting before the vCPUs stop. A guest that is
        already paused is saved by `save_state` alone. Return the time at which QEMU stopped the vCPUs, on the clock of
        `time.perf_counter`. Raises the same errors as `pause`.
        """
        started = time.perf_counter()
        self._state.keeps_disks = self._disk_saving is not None and self._disk_saving.keeps_disks
        if self._state.keeps_disks:
            if not self._control.stays_paused:
                await self._state.prepare_snapshot(await self._control.hold())
            await self._vcpus.pause()
        else:
            await self._vcpus.pause(functools.partial(self._state.stop_to_save, sink))
        return max(started, self._seen.stopped_at)

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
        """Start to read the machine and its disks, which `commit` checks. `discard` reports devices that are added
        later."""
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
        # This also checks that QEMU runs: a process that is being killed is still visible in /proc, but does not reply.
        await self._seen.check_unchanged(monitor)
        await self._seen.check_machine()

    async def resume(self) -> None:
        """Resume the vCPUs (QMP `cont`), unless the guest was already paused before `pause`. It may be called after
        `save_state`.

        Raises WorkloadError if the guest does not run afterwards; WorkloadDied, with `never_ran` if QEMU cannot have
        received `cont`.
        """
        self._handed_over = False
        await self._state.cancel_save()
        self._storage.settle()
        await self._vcpus.resume()
        awaiting.end(self._folder)

    async def announce(self) -> bool:
        """Announce the network addresses of the guest, so that its packets are sent to this host. An error is logged:
        the guest runs in either case. Return False if QEMU does not respond in time."""
        if self._control.given_up:
            return True  # the guardian announces the guest when its disks respond
        try:
            async with asyncio.timeout(announcement.TIMEOUT), self._control.session() as monitor:
                await announcement.announce(monitor)
        except WorkloadError as failed:
            log.info("%s: its network addresses are not announced: %s", self.name, failed)
        except TimeoutError:
            log.info(
                "%s: its network addresses are not announced: QEMU did not respond within %g s",
                self.name,
                announcement.TIMEOUT,
            )
            return False
        return True

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
        migration settings of its user. Records of earlier versions of pageferry have empty `changes`: the guest is
        resumed.

        Raises WorkloadError for invalid changes, and the same errors as `resume`.
        """
        if changes:
            try:
                self._control.take_over(msgspec.convert(changes, Changes))
            except msgspec.ValidationError as wrong:
                raise WorkloadError(f"cannot undo the changes of {self.name}: invalid record: {wrong}") from wrong
        await self._control.hold()
        self._control.start_guardian()
        await self.resume()
        await self._control.settled()

    async def save_state(self) -> bytes:
        """Return the device state of the paused guest, saved by QEMU's own migration or by a snapshot without memory.

        Raises WorkloadError with QEMU's message. The guest can be resumed in either case.
        """
        return await self._state.save()

    async def snapshot_details(self) -> SnapshotDetails:
        """Check devices that were added before the snapshot point, and return the record of the disks, as `GuestDisks`
        describes. Raises UnsupportedError if the guest cannot be saved with such a device, WorkloadDied."""
        with contextlib.suppress(WorkloadDied):  # the saved state and memory are complete
            await self._vcpus.check_machine()
        return await super().snapshot_details()

    async def prepare_load(self) -> None:
        """Have a guest started with `incoming` wait for its state, which saves about 5 ms in `load_state`.

        Raises UnsupportedError if QEMU cannot load its state alone. Also raises WorkloadError.
        """
        await self._state.prepare_load()

    async def load_ahead(self, chunk: bytes) -> None:
        """Load a chunk of a state that `pause_to_save` has passed to its sink, before memory is complete.

        `load_state` loads the remaining part. Raises WorkloadError if the state is of another machine,
        WorkloadDied if QEMU exits.
        """
        await self._state.load_ahead(chunk)

    async def load_state(self, state: bytes) -> None:
        """Load a device state into a guest started with `incoming`. The guest stays paused. Until `commit`, it ends
        with this process.

        Raises WorkloadError, with QEMU's message, if the state does not match this machine or the guest could not run
        with it. Raises WorkloadDied if QEMU exits.
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
        if self._handed_over:
            await self._report_lost_devices()
        if not await self.quit():
            log.warning("%s: process %d has not exited after `quit`, and is killed", self.name, self.pid)
            self._state.close()
            self._control.abandon()
            processes.send_signal(self.pid, self._entry.started, signal.SIGKILL)
            await processes.wait_for_end(self.pid, self._entry.started)
        await self.forget("migrated" if self._handed_over else None)

    async def _report_lost_devices(self) -> None:
        """Log the devices that were added after the last check before the commit: the destination lacks them. A later
        check in the pause would prolong it by about a millisecond."""
        with contextlib.suppress(WorkloadError, TimeoutError):
            async with asyncio.timeout(_ANSWER_TIMEOUT), self._control.session() as monitor:
                if lost := await self._seen.machine.added(monitor):
                    log.warning(
                        "%s: lost the devices %s, which were added while it was handed over; add them at the "
                        "destination",
                        self.name,
                        ", ".join(lost),
                    )

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
