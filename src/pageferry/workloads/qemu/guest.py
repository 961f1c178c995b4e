"""Unmodified QEMU guests as workloads: started under management, or adopted.

Guest memory is a shared file that QEMU and pageferry both map. QMP does the rest: `stop` and `cont` pause and resume
the guest, and QEMU's own migration saves and loads the device state (`device_state`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import msgspec

from pageferry.errors import NoSuchWorkload, UsageError, WorkloadDied, WorkloadError
from pageferry.host import memory_file, proc, processes, qmp_peer
from pageferry.host.blocking import in_thread
from pageferry.host.qmp import TIMEOUT, Monitor
from pageferry.host.registry import Folder, QemuEntry, Registry, identify
from pageferry.memory import mappers
from pageferry.memory.regions import Identity, Region
from pageferry.memory.view import Memory
from pageferry.workloads.direct_io import DRAIN_TIMEOUT, PAUSE_TIMEOUT
from pageferry.workloads.protocols import Condition, Faults, Migratable, OwnershipRecord
from pageferry.workloads.qemu import command_line, device_state, direct_io, kvm_prefault, process, unsupported
from pageferry.workloads.qemu import disks as qemu_disks
from pageferry.workloads.qemu import ram as qemu_ram
from pageferry.workloads.qemu import run_state as qemu_run_state
from pageferry.workloads.qemu import snapshot as qemu_snapshot
from pageferry.workloads.qemu.control import QUIT, Changes, QemuControl
from pageferry.workloads.qemu.kvm_prefault import VirtualMachine
from pageferry.workloads.qemu.machine import Machine
from pageferry.workloads.qemu.process import QemuProcess
from pageferry.workloads.qemu.run_state import LastSeen

_QUIT_TIMEOUT = 10.0
"""Seconds for QEMU to exit after `quit`: it closes its disks first."""

_ANSWER_TIMEOUT = 0.5
"""Seconds for QEMU to reply to `quit`. It replies before it closes its disks."""

_RECENT = 0.05
"""Seconds for which `pause` relies on the checks of `prepare_pause`, if devices and open files of QEMU are the same
after `stop`."""

_LOG = "log"

_NO_PREALLOC = "remove -mem-prealloc and prealloc=on"

log = logging.getLogger(__name__)

T = TypeVar("T")


class QemuWorkload:
    """QEMU guest. Made by `start`, `attach` or `adopt`; several objects, in several processes, can refer to one guest.

    The monitor is held from `pause` (or `load_state`) to `resume` or `discard`: see `control`.
    """

    def __init__(
        self,
        folder: Folder,
        entry: QemuEntry,
        machine: Machine,
        regions: tuple[Region, ...],
        child: QemuProcess | None,
        *,
        ran: bool,
    ) -> None:
        self.name = folder.name
        self._folder = folder
        self._entry = entry
        self._regions = regions
        self._child = child
        self._control = QemuControl(folder.name, entry.qmp_socket)
        self._loading: device_state.Loading | None = None
        """Listener for the device state, until `load_state`."""
        self._seen = LastSeen(folder.name, machine, ran=ran)
        self._prepared = -math.inf
        """Time of the last `_prepare_pause`."""

    # -- start, attach, adopt -----------------------------------------------------------------------------------------

    @classmethod
    async def start(
        cls,
        name: str,
        arguments: Sequence[str],
        *,
        incoming: bool = False,
        at_once: bool = False,
        detach: bool = True,
        hugetlb: bool = False,
        registry: Registry | None = None,
    ) -> Self:
        """Start a QEMU from the user's command line, program first, with its memory in a shared file.

        `incoming`: the guest waits, paused, for `load_state`. `at_once`: `load_state` follows soon, so the monitor is
        kept open. `detach`: run in a separate session, with the output in the log of the workload; otherwise on the
        terminal of this process. `hugetlb`: memory on hugetlbfs. A failed start leaves no process and no file behind.

        Raises UsageError, UnsupportedError for options that cannot be managed, NameInUse, WorkloadError with QEMU's
        message.
        """
        command = command_line.parse(arguments)
        for warning in command.warnings:
            log.warning("%s", warning)
        if at_once and command.preallocates:
            log.warning(
                "%s: the memory of a restored guest is not preallocated; QEMU starts later: %s", name, _NO_PREALLOC
            )
        folder = (registry or Registry()).claim(name)
        try:
            child, path = _launch(folder, command, incoming=incoming, detach=detach, hugetlb=hugetlb)
            try:
                workload = await cls._take_over(folder, path, child)
                if incoming:
                    await workload._await_state(at_once)
                return workload
            except BaseException:
                child.kill()
                raise
        except BaseException:
            folder.release()
            raise

    @classmethod
    async def attach(cls, name: str, *, registry: Registry | None = None, timeout: float = TIMEOUT) -> Self:
        """Return the guest of that name, regardless of the process that started it. `timeout`: seconds to wait for its
        monitor.

        Raises NoSuchWorkload, also if the name belongs to another kind of workload, WorkloadError, WorkloadDied.
        """
        folder = (registry or Registry()).folder(name)
        entry = folder.registry.lookup(name)
        if not isinstance(entry, QemuEntry):
            raise NoSuchWorkload(f"{name} is not a QEMU guest, or is still being started; see `pageferry list`")
        async with await Monitor.open(entry.qmp_socket, timeout=timeout) as monitor:
            machine, pid = await _ask_machine(monitor)
            if pid != entry.pid:
                raise WorkloadError(
                    f"cannot attach to {name}: {entry.qmp_socket} is served by process {pid}, and the guest is "
                    f"process {entry.pid}; end the process that has taken the socket"
                )
            ran = await qemu_run_state.runs(monitor)
            regions = await _regions_of(monitor, entry.pid)
        return cls(folder, entry, machine, regions, None, ran=ran)

    @classmethod
    async def adopt(cls, name: str, qmp_socket: str, *, registry: Registry | None = None) -> Self:
        """Manage, as `name`, a running QEMU with its memory in a shared file that another process has started.

        Raises UnsupportedError, with the options that it should have been started with, NameInUse, WorkloadError.
        """
        folder = (registry or Registry()).claim(name)
        try:
            return await cls._take_over(folder, os.path.join(os.getcwd(), qmp_socket), None)
        except BaseException:
            folder.release()
            raise

    @classmethod
    async def _take_over(cls, folder: Folder, qmp_socket: str, child: QemuProcess | None) -> Self:
        """Check the QEMU behind a monitor, and register it."""
        opening = child.monitor(qmp_socket) if child is not None else Monitor.open(qmp_socket)
        async with await opening as monitor:
            machine, pid = await _ask_machine(monitor)
            await unsupported.refuse_running(monitor)
            ran = await qemu_run_state.runs(monitor)
            regions = await _regions_of(monitor, pid)
        for region in regions:
            if qemu_ram.misaligned(region):
                log.warning("%s: huge pages are disabled; start QEMU with align=2M for this memory", region.name)
        entry = _entry(pid, qmp_socket, adopted=child is None)
        folder.publish(entry)
        return cls(folder, entry, machine, regions, child, ran=ran)

    # -- the workload protocol -----------------------------------------------------------------------------------------

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
        path = self._folder.path / _LOG
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
        await self._prepare_pause()
        files = await in_thread(direct_io.direct_files, self.pid, self.name)
        await direct_io.await_requests(self.pid, files, self.name)

    async def pause(self) -> None:
        """Stop the vCPUs (QMP `stop`), and determine the run state and the machine.

        A guest that is already paused, also one that another client has paused since, stays paused in `resume`. Until
        `commit`, a guardian resumes the guest if this process exits.

        Raises WorkloadError if the guest has shut down since the last check and cannot run without a reset.
        """
        if time.monotonic() - self._prepared > _RECENT:
            await self._prepare_pause()
        monitor, machine = await self._control.hold(), self._seen.machine
        self._control.plan_to_restore()
        ran = await self._bounded(self._seen.stop(monitor), PAUSE_TIMEOUT)
        self._control.stays_paused = not ran
        self._control.plan_to_restore()
        self._seen.check_not_ended(ran)
        if self._seen.machine != machine:
            await unsupported.refuse_running(monitor)
        direct_io.refuse_pinning(self.pid, self.name)  # a device may have been added

    async def does_direct_io(self) -> bool:
        """Return whether QEMU has a disk open whose reads may pin guest memory. Raises UnsupportedError,
        WorkloadDied."""
        return bool(await in_thread(direct_io.direct_files, self.pid, self.name))

    async def drain(self) -> float | None:
        """Wait for the disk requests that write to guest memory directly, in a short pause (`stop`, `cont`).

        `stop` is the only command of QEMU that is documented to wait for all requests. A guardian resumes the guest if
        this process exits during the pause.
        """
        files = await in_thread(direct_io.direct_files, self.pid, self.name)
        if not files:
            return None  # the monitor is not opened in each round for this; `pause` checks the devices
        async with self._control.session() as monitor:
            await unsupported.refuse_running(monitor)
            if not (await monitor.execute("query-status"))["running"]:
                return 0.0
            await direct_io.await_requests(self.pid, files, self.name)
            return await self._to_the_end(self._stop_briefly(monitor))

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
                await qemu_disks.release(await self._control.hold())
            return
        self._control.plan_by_owner(record)
        # Also checks that QEMU runs: a process that is being killed is still visible in /proc, but does not reply.
        await self._seen.check_unchanged(monitor)

    async def resume(self) -> None:
        """Resume the vCPUs (QMP `cont`), also after `save_state`, unless the guest was already paused before `pause`.

        Raises WorkloadError if the guest does not run afterwards; WorkloadDied, with `never_ran` if QEMU cannot have
        received `cont`.
        """
        if self._control.given_up:
            log.warning("%s: paused until its disks respond; a guardian process resumes it then", self.name)
            return
        monitor = await self._control.hold()
        if monitor.hung_up:  # `cont` was not sent, and no other client can send it
            raise WorkloadDied(
                f"{self.name} (process {self.pid}) ended before it ran{self._last_words()}", never_ran=True
            )
        self._control.plan_to_restore()
        if not self._control.stays_paused:
            await self._continue(monitor)
        elif self._control.disks_released:
            await self._lock_disks(monitor)
        self._control.settle(monitor)

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
        was_running = not self._control.stays_paused
        async with self._control.session() as monitor:
            await self._control.prepare_state(monitor)
            stream = await (device_state.save(monitor) if was_running else self._save_snapshot(monitor))
            await self._seen.saved(monitor)
        return device_state.SavedState(machine=self._seen.machine.type, was_running=was_running, stream=stream).encode()

    async def prepare_load(self) -> None:
        """Let a guest started with `incoming` listen for its state, which saves about 5 ms in `load_state`.

        Raises UnsupportedError if QEMU cannot load its state alone, WorkloadError.
        """
        if self._loading is None:
            monitor = await self._control.hold()
            await self._control.prepare_state(monitor, incoming=True)
            self._loading = await device_state.Loading.begin(monitor)

    async def load_state(self, state: bytes) -> None:
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
        self._stop_loading()
        self._control.abandon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUIT_TIMEOUT):
                await processes.wait_for_end(self.pid, self._entry.started)
        return not self._entry.alive

    async def discard(self) -> None:
        """End QEMU (QMP `quit`, or else SIGKILL), and remove the workload."""
        if not await self.quit():
            log.warning("%s: process %d has not exited after `quit`, and is killed", self.name, self.pid)
            self._stop_loading()
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
        return Condition("running" if state == "running" else "paused", qemu_run_state.reason(state))

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
        self._stop_loading()
        self._control.abandon()

    # -- exit ---------------------------------------------------------------------------------------------------------

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

    # -- the monitor ---------------------------------------------------------------------------------------------------

    async def _prepare_pause(self) -> None:
        monitor = await self._control.hold()
        self._control.start_guardian()
        known = self._control.prepared
        # Devices may have been added since the last check.
        status, _ = await asyncio.gather(self._control.note_status(monitor), unsupported.refuse_running(monitor))
        if status == qemu_run_state.MIGRATED and not known:
            log.warning("%s: %s", self.name, qemu_run_state.reason(status))
        self._seen.ran = self._seen.ran or not self._control.stays_paused
        await self._control.prepare_state(monitor)
        self._prepared = time.monotonic()

    async def _stop_briefly(self, monitor: Monitor) -> float:
        """Stop the guest and, unless another client had paused it, continue it. Return the duration of the pause in
        seconds."""
        self._control.start_guardian()
        self._control.plan([{"execute": "cont"}, *self._control.undo])
        started, ran = time.perf_counter(), True
        try:
            with monitor.events("STOP") as stopped:
                await self._bounded(monitor.execute("stop"), DRAIN_TIMEOUT)
                ran = not stopped.empty()
        finally:
            if not self._control.given_up:
                if ran:
                    await self._continue(monitor)
                self._control.plan(self._control.undo)
        return time.perf_counter() - started

    async def _bounded(self, stopping: Coroutine[Any, Any, T], timeout: float) -> T:
        """Limit the time of a call that waits for all disk requests of the guest (QMP `stop`), and cannot be
        cancelled."""
        try:
            async with asyncio.timeout(timeout):
                return await stopping
        except TimeoutError as late:
            self._control.give_up()
            files = await in_thread(direct_io.direct_files, self.pid, self.name)
            disks = ", ".join(sorted(set(files.values()))) or "its disks"
            raise WorkloadError(
                f"{direct_io.slow(self.name, disks, timeout)}; the guest is paused until then"
            ) from late

    async def _to_the_end(self, work: Coroutine[Any, Any, float]) -> float:
        """Return the result of `work`. A cancellation takes effect when it has completed, so that the guest runs
        again."""
        task = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait((task,))
            raise

    async def _continue(self, monitor: Monitor) -> None:
        with monitor.events("RESUME") as resumed:
            await self._tell_to_run(monitor)
            # The event precedes the reply; if it is missing, the run state has to be queried.
            if not resumed.empty():
                return
        status = await monitor.execute("query-status")
        if not status["running"]:
            raise WorkloadError(f"cannot resume {self.name}: its run state after `cont` is {status['status']}")

    async def _tell_to_run(self, monitor: Monitor) -> None:
        try:
            await monitor.execute("cont")
        except WorkloadDied as died:
            never_ran = await monitor.left_unread()
            raise WorkloadDied(
                f"{self.name} (process {self.pid}): {died}{self._last_words()}", never_ran=never_ran
            ) from died
        except WorkloadError as refused:  # for example, another process holds a lock on a disk
            refused.never_ran = True
            raise

    async def _save_snapshot(self, monitor: Monitor) -> bytes:
        snapshot = qemu_snapshot.Snapshot()
        self._control.plan_to_restore(first=snapshot.removal)
        stream = await snapshot.save(monitor)
        self._control.plan_to_restore()
        return stream

    async def _lock_disks(self, monitor: Monitor) -> None:
        try:
            await qemu_disks.lock(monitor)
        except WorkloadDied:
            raise
        except WorkloadError as failed:
            log.warning("%s: its disks are not locked while it is paused: %s", self.name, failed)

    def _stop_loading(self) -> None:
        if self._loading is not None:
            self._loading.close()
            self._loading = None

    async def _await_state(self, at_once: bool) -> None:
        """Prepare for `load_state`. Until then the guest has no state, and ends with this process."""
        self._control.start_guardian()
        self._control.plan([QUIT])
        async with self._control.session(keep=at_once) as monitor:
            await self._control.prepare_state(monitor, incoming=True)

    def _last_words(self) -> str:
        return f"; QEMU says:\n{said}" if (said := process.log_tail(self._folder.path / _LOG)) else ""


def _launch(
    folder: Folder, command: command_line.CommandLine, *, incoming: bool, detach: bool, hugetlb: bool
) -> tuple[QemuProcess, str]:
    """Start QEMU with a memory file, and register it at once, so that it is not lost if this process is killed."""
    qmp_socket = folder.socket_path("qmp.sock")
    if hugetlb and not command.needs_ram_file:
        raise UsageError(
            "`hugetlb` applies to memory that pageferry adds, and the command line has a memory backend; remove one "
            "of them"
        )
    ram = None
    try:
        if command.needs_ram_file:
            ram = memory_file.create_ram_file(command.ram_size, hugetlb=hugetlb)
            if ram.warning:
                log.warning("%s", ram.warning)
        path = ram.inherited_path if ram is not None else None
        words = command.managed(ram_path=path, qmp_socket=qmp_socket, incoming=incoming)
        descriptors = [ram.fd] if ram is not None else []
        child = process.launch(words, descriptors, folder.path / _LOG if detach else None)
    finally:
        if ram is not None:
            os.close(ram.fd)
    with contextlib.suppress(WorkloadDied):  # the caller, which waits for the monitor, reports why it has exited
        folder.publish(_entry(child.pid, qmp_socket, adopted=False))
    return child, qmp_socket


def _entry(pid: int, qmp_socket: str, *, adopted: bool) -> QemuEntry:
    return QemuEntry(**identify(pid), qmp_socket=qmp_socket, adopted=adopted)


async def _ask_machine(monitor: Monitor) -> tuple[Machine, int]:
    """Return the machine behind a monitor, and the process id of its QEMU."""
    threads = [cpu["thread-id"] for cpu in await monitor.execute("query-cpus-fast")]
    pid = await in_thread(qmp_peer.find_process, monitor.peer, threads, monitor.path)
    return await Machine.ask(monitor), pid


async def _regions_of(monitor: Monitor, pid: int) -> tuple[Region, ...]:
    try:
        return await qemu_ram.open_regions(monitor, pid)
    except PermissionError as denied:
        raise WorkloadError(
            f"cannot open the memory of process {pid}: {denied.strerror}; run pageferry as the user of that QEMU, "
            "or as root"
        ) from denied
