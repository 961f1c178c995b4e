"""Unmodified QEMU guests as workloads: started under management, or adopted.

Guest memory is a shared file that QEMU and pageferry both map; QMP does the rest: `stop` and `cont` pause and resume,
QEMU's own migration saves and loads the device state (`device_state`).
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
from pageferry.workloads.direct_io import DRAIN_TIMEOUT, PAUSE_TIMEOUT
from pageferry.workloads.protocols import Faults, Witness
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
"""Seconds for QEMU to end after `quit`: it closes its disks first."""

_ANSWER_TIMEOUT = 0.5
"""Seconds for QEMU to answer `quit`. It answers before it closes its disks."""

_RECENT = 0.05
"""Seconds for which `pause` relies on the checks of `prepare_pause`, as far as devices and open files of QEMU are the
same after `stop`."""

_LOG = "log"

_NO_PREALLOC = "remove -mem-prealloc and prealloc=on"

MIGRATED = "postmigrate"
"""Run state of a QEMU whose own migration has completed."""
MAY_RUN = "it may run on another host; if it does not, QMP cont resumes it"

log = logging.getLogger(__name__)

T = TypeVar("T")


class QemuWorkload:
    """A QEMU guest. Made by `start`, `attach` or `adopt`; several objects, in several processes, may be about one.

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
        """What waits for the device state."""
        self._seen = LastSeen(folder.name, machine, ran=ran)
        self._prepared = -math.inf
        """Time of the last `_prepare_pause`."""

    # -- making one --------------------------------------------------------------------------------------------------

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

        `incoming`: the guest waits, paused, for `load_state`, which comes `at_once`: the monitor is held for it.
        `detach`: in a session of its own, with its output in the log of its folder; else on our terminal. `hugetlb`:
        memory on hugetlbfs. A failure leaves nothing behind.

        Raises UsageError, UnsupportedError for what cannot be managed, NameInUse, WorkloadError with QEMU's words.
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
        """The guest of that name, whoever started it; `timeout`: seconds to wait for its monitor.

        Raises NoSuchWorkload, also where the name is another kind of workload's; WorkloadError, WorkloadDied.
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
        """Manage, as `name`, a QEMU that somebody else has started with its memory in a shared file.

        Raises UnsupportedError, saying with which options it should have been started; NameInUse, WorkloadError.
        """
        folder = (registry or Registry()).claim(name)
        try:
            return await cls._take_over(folder, os.path.join(os.getcwd(), qmp_socket), None)
        except BaseException:
            folder.release()
            raise

    @classmethod
    async def _take_over(cls, folder: Folder, qmp_socket: str, child: QemuProcess | None) -> Self:
        """Look at a QEMU that answers on its monitor, and publish it."""
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
        """Kind, name, and the details `qemu` (its version), `machine` (type with version), `cpus`, `devices`, and the
        CPU: `cpu` (model), `cpu-signature`, `cpu-features`."""
        return Identity("qemu", self.name, self._seen.machine.details)

    def check_source(self, details: Mapping[str, Any]) -> None:
        """Raises WorkloadError if a guest whose identity has these details cannot be received here, and says why."""
        self._seen.machine.check_source(details, "the source", f"{self.name} at the destination")

    def check_image(self, details: Mapping[str, Any], path: str) -> None:
        """The same for a guest whose identity is recorded in an image. Raises WorkloadError."""
        self._seen.machine.check_source(details, path, self.name)

    @property
    def pid(self) -> int:
        """Of QEMU."""
        return self._entry.pid

    @property
    def qmp_socket(self) -> str:
        """Path of its monitor."""
        return self._entry.qmp_socket

    @property
    def guardian(self) -> int | None:
        """Pid of the process that acts if we die (see `guardian`); None while there is no need for one."""
        return self._control.guardian

    @property
    def log(self) -> Path | None:
        """Where a detached QEMU's output goes; None for one on a terminal, or adopted."""
        path = self._folder.path / _LOG
        return path if path.exists() else None

    @property
    def regions(self) -> tuple[Region, ...]:
        """Guest memory, one region for each memory backend, named as QEMU's ramblocks."""
        return self._regions

    @property
    def handed_out(self) -> bool:
        """False: a guest's file is not given to other processes."""
        return False

    async def check_mappers(self) -> None:
        """Raise WorkloadError where another process maps the guest's memory for writing (see `mappers`)."""
        await in_thread(lambda: mappers.refuse_strangers(self.name, self._regions))

    async def prepare_pause(self) -> None:
        """All of `pause` that can be done while the guest still runs, some 50 ms of work; `pause` does it if need be.

        Raises UnsupportedError where QEMU cannot save its state alone, WorkloadError.
        """
        await self._prepare_pause()
        files = await in_thread(direct_io.direct_files, self.pid, self.name)
        await direct_io.await_requests(self.pid, files, self.name)

    async def pause(self) -> None:
        """Stop the vCPUs (QMP `stop`), and find out what the guest and its machine are now.

        A guest that does not run already, also one that another client has paused meanwhile, is left so by `resume`
        too. Until `commit` a guardian resumes the guest if this process dies.

        Raises WorkloadError if the guest has ended since the last look and cannot run again without a reset.
        """
        if time.monotonic() - self._prepared > _RECENT:
            await self._prepare_pause()
        monitor, machine = await self._control.hold(), self._seen.machine
        self._control.bequeath_as_before()
        ran = await self._bounded(self._seen.stop(monitor), PAUSE_TIMEOUT)
        self._control.stays_paused = not ran
        self._control.bequeath_as_before()
        self._seen.check_not_ended(ran)
        if self._seen.machine != machine:
            await unsupported.refuse_running(monitor)
        direct_io.refuse_pinning(self.pid, self.name)  # a device may have been added

    async def does_direct_io(self) -> bool:
        """Whether QEMU has a disk open whose reads may pin guest memory. Raises UnsupportedError, WorkloadDied."""
        return bool(await in_thread(direct_io.direct_files, self.pid, self.name))

    async def drain(self) -> float | None:
        """Wait for the requests of disks that write to guest memory directly, in a short pause (`stop`, `cont`).

        The only command of QEMU that is documented to wait for all requests is `stop`. A guardian lets the guest run
        if this process exits meanwhile.
        """
        files = await in_thread(direct_io.direct_files, self.pid, self.name)
        if not files:
            return None  # nothing to wait for: the monitor is not opened in each round, and `pause` checks the devices
        async with self._control.session() as monitor:
            await unsupported.refuse_running(monitor)
            if not (await monitor.execute("query-status"))["running"]:
                return 0.0
            await direct_io.await_requests(self.pid, files, self.name)
            return await self._to_the_end(self._stop_briefly(monitor))

    async def commit(self, witness: Witness | None = None) -> None:
        """The guest may run elsewhere from now on: it stays paused, even if this process dies.

        With a `witness` the guardian will read it then: the guest runs here, or ends. Raises WorkloadDied, and
        WorkloadError if another client has changed the guest since its state was saved or loaded.
        """
        monitor = await self._control.hold()
        if witness is None:
            await self._seen.check_unchanged(monitor)
            self._control.bequeath([])
            if self._control.stays_paused:
                # The destination opens the disks before this QEMU ends. Of a guest that ran `save_state` did this.
                self._control.disks_released = True
                await qemu_disks.release(await self._control.hold())
            return
        self._control.bequeath_to_owner(witness)
        # Also proves that QEMU lives: a process that is being killed is still seen in /proc, but does not answer.
        await self._seen.check_unchanged(monitor)

    async def resume(self) -> None:
        """Let the vCPUs run (QMP `cont`), also after `save_state`; unless the guest was not running to begin with.

        Raises WorkloadError where it does not run then; WorkloadDied, with `never_ran` where it cannot have heard this.
        """
        if self._control.given_up:
            log.warning("%s: paused until its disks respond; a guardian process resumes it then", self.name)
            return
        monitor = await self._control.hold()
        if monitor.hung_up:  # nobody has been told to run it, and nobody is left who could
            raise WorkloadDied(
                f"{self.name} (process {self.pid}) ended before it ran{self._last_words()}", never_ran=True
            )
        self._control.bequeath_as_before()
        if not self._control.stays_paused:
            await self._continue(monitor)
        elif self._control.disks_released:
            await self._lock_disks(monitor)
        self._control.settle(monitor)

    @property
    def changes(self) -> dict[str, Any]:
        """What another process has to undo, by `revert`, if this one ends after `commit`."""
        found: dict[str, Any] = msgspec.to_builtins(self._control.changes)
        return found

    async def revert(self, changes: Mapping[str, Any]) -> None:
        """Make a committed guest as it was before the process that committed it changed it: running or paused, with
        the migration settings of its user. Empty `changes` are those of an older release: the guest is resumed.

        Raises WorkloadError for changes that cannot be read, and as `resume`.
        """
        if changes:
            try:
                self._control.take_over(msgspec.convert(changes, Changes))
            except msgspec.ValidationError as wrong:
                raise WorkloadError(f"cannot undo the changes of {self.name}: invalid record ({wrong})") from wrong
        await self._control.hold()
        self._control.have_will()
        await self.resume()
        await self._control.settled()

    async def save_state(self) -> bytes:
        """The device state of the paused guest, by QEMU's own migration or snapshot without memory.

        Raises WorkloadError with QEMU's words; the guest can be resumed then, and after success, too.
        """
        was_running = not self._control.stays_paused
        async with self._control.session() as monitor:
            await self._control.prepare_state(monitor)
            stream = await (device_state.save(monitor) if was_running else self._save_snapshot(monitor))
            await self._seen.saved(monitor)
        return device_state.SavedState(machine=self._seen.machine.type, was_running=was_running, stream=stream).encode()

    async def prepare_load(self) -> None:
        """Have a guest started with `incoming` listen for its state, which saves some 5 ms in `load_state`.

        Raises UnsupportedError where QEMU cannot load its state alone, WorkloadError.
        """
        if self._loading is None:
            monitor = await self._control.hold()
            await self._control.prepare_state(monitor, incoming=True)
            self._loading = await device_state.Loading.begin(monitor)

    async def load_state(self, state: bytes) -> None:
        """Load a device state into a guest started with `incoming`, which stays paused; until `commit` it ends with us.

        Raises WorkloadError with QEMU's words where it does not fit this machine, or if the guest could not run then;
        WorkloadDied.
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
        """Fill KVM's tables where the guest runs on KVM, and the kernel can (see `kvm_prefault`); bytes mapped.

        Raises OSError with the kernel's reason, WorkloadError, WorkloadDied.
        """
        machine = VirtualMachine.find(self.pid)
        if machine is None:
            return 0
        async with self._control.session() as monitor:
            return await kvm_prefault.prefault(monitor, machine, self._regions, units)

    async def quit(self, answer: float = _ANSWER_TIMEOUT) -> bool:
        """Have QEMU end (QMP `quit`). Return False if it does not answer in time, or has not ended 10 s after that."""
        self._control.bequeath([])
        try:
            async with asyncio.timeout(answer), self._control.session() as monitor:
                await monitor.run(QUIT)
        except WorkloadError:
            pass  # it has ended, or ends
        except TimeoutError:
            return False
        self._stop_loading()
        self._control.abandon()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUIT_TIMEOUT):
                await processes.wait_for_end(self.pid, self._entry.started)
        return not self._entry.alive

    async def discard(self) -> None:
        """End QEMU (QMP `quit`, or SIGKILL if that does not help), and forget the workload."""
        if not await self.quit():
            log.warning("%s: process %d has not exited after `quit`, and is killed", self.name, self.pid)
            self._stop_loading()
            self._control.abandon()
            processes.send_signal(self.pid, self._entry.started, signal.SIGKILL)
            await processes.wait_for_end(self.pid, self._entry.started)
        await self.forget()

    async def running(self) -> bool:
        """Whether the vCPUs run. Raises WorkloadDied when QEMU is gone."""
        return await self.run_state() == "running"

    async def run_state(self) -> str:
        """QEMU's name of what the guest does, such as `running`, `paused`, `postmigrate`. Raises WorkloadDied."""
        if not self._entry.alive:
            raise WorkloadDied(f"{self.name} (process {self.pid}) has ended{self._last_words()}")
        async with self._control.session() as monitor:
            return str((await monitor.execute("query-status"))["status"])

    def faults(self) -> Faults:
        """Page faults of the vCPU threads. Raises WorkloadDied when QEMU is gone."""
        ours = proc.inner_threads(self.pid)
        vcpus = {ours[thread] for thread in self._seen.machine.vcpu_threads if thread in ours}
        return Faults(*proc.thread_faults(self.pid, vcpus))

    def close(self) -> None:
        """Let go of the guest: one that we have paused and not committed runs on, one that waits for its state ends."""
        for region in self._regions:
            os.close(region.fd)
        self._regions = ()
        self._stop_loading()
        self._control.abandon()

    # -- the end of one ------------------------------------------------------------------------------------------------

    async def ended(self) -> int | None:
        """Wait until QEMU has ended; its exit code (-N: signal N) where it is our child. Also see `forget`."""
        if self._child is not None:
            return await self._child.wait()
        await processes.wait_for_end(self.pid, self._entry.started)
        return None

    async def died(self) -> NoReturn:
        """Wait until QEMU has ended. Raises WorkloadDied then, with what it said."""
        await self.ended()
        raise WorkloadDied(f"{self.name} (process {self.pid}) ended while it waited for its source{self._last_words()}")

    async def forget(self) -> None:
        """After QEMU's end: close our files, and remove name, log and records."""
        if self._child is not None:
            await self._child.wait()
        self.close()
        self._folder.release()

    # -- the monitor ---------------------------------------------------------------------------------------------------

    async def _prepare_pause(self) -> None:
        monitor = await self._control.hold()
        self._control.have_will()
        known = self._control.prepared
        # Devices may have been added since the guest was last looked at.
        status, _ = await asyncio.gather(self._control.note_status(monitor), unsupported.refuse_running(monitor))
        if status == MIGRATED and not known:
            log.warning("%s: migrated by QEMU, not by pageferry: %s", self.name, MAY_RUN)
        self._seen.ran = self._seen.ran or not self._control.stays_paused
        await self._control.prepare_state(monitor)
        self._prepared = time.monotonic()

    async def _stop_briefly(self, monitor: Monitor) -> float:
        """Stop the guest and continue it; the seconds between. A guest that another client has paused stays so."""
        self._control.have_will()
        self._control.bequeath([{"execute": "cont"}, *self._control.undo])
        started, ran = time.perf_counter(), True
        try:
            with monitor.events("STOP") as stopped:
                await self._bounded(monitor.execute("stop"), DRAIN_TIMEOUT)
                ran = not stopped.empty()
        finally:
            if not self._control.given_up:
                if ran:
                    await self._continue(monitor)
                self._control.bequeath(self._control.undo)
        return time.perf_counter() - started

    async def _bounded(self, stopping: Coroutine[Any, Any, T], timeout: float) -> T:
        """A call that waits for all requests of the guest to its disks (QMP `stop`), and cannot be cut short."""
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
        """A cancellation waits until the guest runs again."""
        task = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait((task,))
            raise

    async def _continue(self, monitor: Monitor) -> None:
        with monitor.events("RESUME") as resumed:
            await self._tell_to_run(monitor)
            # The event comes before the answer; without it there is something to find out.
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
        except WorkloadError as refused:  # for example because another process has a disk locked
            refused.never_ran = True
            raise

    async def _save_snapshot(self, monitor: Monitor) -> bytes:
        snapshot = qemu_snapshot.Snapshot()
        self._control.bequeath_as_before(first=snapshot.removal)
        stream = await snapshot.save(monitor)
        self._control.bequeath_as_before()
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
        """Be ready for `load_state`; until then the guest is worth nothing, and ends with this process."""
        self._control.have_will()
        self._control.bequeath([QUIT])
        async with self._control.session(keep=at_once) as monitor:
            await self._control.prepare_state(monitor, incoming=True)

    def _last_words(self) -> str:
        return f"; QEMU says:\n{said}" if (said := process.log_tail(self._folder.path / _LOG)) else ""


def _launch(
    folder: Folder, command: command_line.CommandLine, *, incoming: bool, detach: bool, hugetlb: bool
) -> tuple[QemuProcess, str]:
    """Start QEMU with a memory file, and publish it already: it must not be lost if we are killed now."""
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
    with contextlib.suppress(WorkloadDied):  # why it has ended is told by whoever waits for its monitor
        folder.publish(_entry(child.pid, qmp_socket, adopted=False))
    return child, qmp_socket


def _entry(pid: int, qmp_socket: str, *, adopted: bool) -> QemuEntry:
    return QemuEntry(**identify(pid), qmp_socket=qmp_socket, adopted=adopted)


async def _ask_machine(monitor: Monitor) -> tuple[Machine, int]:
    """The machine behind a monitor, and the pid of its QEMU."""
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
