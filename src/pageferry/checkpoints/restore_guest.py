"""Restore of QEMU guests from images: a guest runs at once, and its memory is loaded on demand (S10)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from pageferry import values
from pageferry.checkpoints import sharing_memory as sharing
from pageferry.checkpoints.eager import reporter
from pageferry.checkpoints.events import (
    EagerEvent,
    ProgressEvent,
    RestoreResult,
    RunningEvent,
    TimeToRunning,
    TouchedEvent,
)
from pageferry.checkpoints.restore_disks import GuestDisks
from pageferry.checkpoints.restore_options import GuestOptions
from pageferry.checkpoints.restored_identity import RestoredIdentity
from pageferry.errors import DisksDiffer, PageferryError, RestoreError, UsageError, WorkloadError
from pageferry.events import Latency, Listener, ignore
from pageferry.host.blocking import in_thread
from pageferry.host.fault_points import fault_point
from pageferry.host.registry import Folder, Registry
from pageferry.host.stopwatch import Stopwatch
from pageferry.memory.regions import SMALL_PAGE
from pageferry.pager import client, records
from pageferry.pager.launcher import PagerConnection, PagerProcess, connect_to_base
from pageferry.pager.orders import Loading, Opened
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.protocol import PagerRequest, PagerStatus
from pageferry.pager.records import Deferred
from pageferry.workloads.qemu.guest import QemuWorkload

_POLL = 0.2
"""Interval at which the progress is polled, seconds."""


async def restore_guest(
    name: str,
    path: str | Path,
    arguments: Sequence[str],
    *,
    listener: Listener = ignore,
    registry: Registry | None = None,
    pager: PagerConnection | None = None,
    **options: Any,
) -> tuple[QemuWorkload, RestoreResult]:
    """Start QEMU with the user's command line, and resume the guest at once from the state in the image.

    The guest's memory is loaded on demand by a pager process that outlives this process. The result contains the time
    until the guest ran. If page faults of QEMU cannot be handled, all memory is loaded before the guest runs, and the
    result contains the reason. `options` are the fields of `pageferry.checkpoints.restore_options.GuestOptions`.
    `pager`: pager process that the caller has already started, to save time.

    Raises ImageError, UsageError if the image is not that of a guest, RestoreError if the image does not match this
    guest, DisksDiffer if disks are not known to be unchanged, and the errors of `QemuWorkload.start`. In these cases,
    QEMU and the pager are terminated; on cancellation too. Raises RestoreError if the pager exits after the guest has
    been resumed; the guest then waits for its memory.
    """
    restore = open_restore(name, path, listener=listener, registry=registry, pager=pager, **options)
    return await restore.run(arguments)


def open_restore(
    name: str,
    path: str | Path,
    *,
    listener: Listener = ignore,
    registry: Registry | None = None,
    pager: PagerConnection | None = None,
    **options: Any,
) -> GuestRestore:
    """Prepare a restore for its `run`, and start its pager. The parameters are those of `restore_guest`."""
    chosen = values.options(GuestOptions, options)
    folder = Folder(registry or Registry(), name)
    if pager is None:
        pager = start_pager(folder.registry, path, chosen)
    return GuestRestore(folder, path, chosen, listener, pager)


def start_pager(registry: Registry, path: str | Path, options: GuestOptions) -> PagerConnection:
    """Start a pager process. With shared memory, connect to the pager of the image's base if it is running."""
    running = connect_to_base(registry, path) if options.memory == "shared" else None
    return running if running is not None else PagerProcess()


class GuestRestore:
    """Restore of one guest. `run` is the whole sequence; `discard` ends the guest."""

    def __init__(
        self, folder: Folder, path: str | Path, options: GuestOptions, listener: Listener, pager: PagerConnection
    ) -> None:
        self.folder = folder
        self.path = Path(path)
        self.options = options
        self.listener = listener
        self._pager = pager
        self._identity = RestoredIdentity(str(path), options.guid, options.clock)
        self._times = Stopwatch("qemu_start")
        self._loaded: tuple[str, Loading] | None = None
        """Reason why all contents were loaded before the guest ran, and the final progress; None if they are loaded on
        demand."""
        self._was_paused = False
        """Whether the guest was paused when it was saved."""
        self._disks = GuestDisks(folder.name, self.path, options.disks)
        self._workload: QemuWorkload | None = None
        """Guest, from the start of its QEMU until `discard`."""

    async def run(self, arguments: Sequence[str]) -> tuple[QemuWorkload, RestoreResult]:
        """Restore the guest with the given command line of QEMU."""
        opening = asyncio.ensure_future(self._pager.open(self.path, self.folder.name))  # faster than the start of QEMU
        opening.add_done_callback(_retrieve)
        try:
            arguments = await in_thread(self._disks.prepare, arguments)
            workload = self._workload = await self._start_guest(arguments, opening)
            image, paused = await self._load_and_resume(workload, opening)
        except BaseException:
            await asyncio.shield(self._withdraw())
            raise
        self._times.stop_all()
        fault_point("restore.resumed")
        try:
            result = await self._running(image, paused)
            await workload.announce()
        except RestoreError:
            raise  # the pager has exited: the guest waits until another pager takes over
        except BaseException:
            await asyncio.shield(self._withdraw())
            raise
        return workload, result

    async def discard(self) -> None:
        """End the guest, if its QEMU has been started, and remove its overlays. May be called twice."""
        workload, self._workload = self._workload, None
        try:
            if workload is not None:
                await workload.discard()
        finally:
            await in_thread(self._disks.discard)

    # -- before the guest runs

    async def _start_guest(self, arguments: Sequence[str], opening: asyncio.Future[Opened]) -> QemuWorkload:
        """Start QEMU. If the start fails and the image cannot be used either, raise the error of the image, which is
        more useful."""
        try:
            return await QemuWorkload.start(
                self.folder.name,
                await self._identity.command_line(arguments, opening),
                incoming=True,
                at_once=True,
                detach=self.options.detach,
                hugetlb=self.options.hugetlb,
                clone=self.options.memory == "shared",
                registry=self.folder.registry,
            )
        except asyncio.CancelledError:
            raise  # do not wait for the image: its disk may not respond
        except BaseException:
            (opened,) = await asyncio.gather(opening, return_exceptions=True)
            if isinstance(opened, PageferryError):
                raise opened from None
            raise

    async def _load_and_resume(self, workload: QemuWorkload, opening: asyncio.Future[Opened]) -> tuple[Opened, bool]:
        """Load the state, and resume the guest. Return the image, and whether the guest stays paused."""
        self._times.phase("adopt")
        image = await opening
        await self._prepare(workload, image)
        fault_point("restore.adopted")
        self._times.phase("device_state")
        await self._pager.during(workload.load_state(image.state))
        self._was_paused = workload.stays_paused
        self._choose_run_state(workload)
        paused = workload.stays_paused
        self._times.phase("resume")
        await self._pager.during(workload.resume())
        return image, paused

    async def _prepare(self, workload: QemuWorkload, image: Opened) -> None:
        """Make the pager handle every access to missing memory; if it cannot, load all memory."""
        await self._check(workload, image)
        if self.options.memory == "shared":
            self._pager = await sharing.share(
                workload, self._pager, self.folder, str(self.path.absolute()), self.options
            )
            await workload.prepare_load()
            return
        work = Deferred(
            image=str(self.path.absolute()),
            identity=image.identity,
            qmp_socket=workload.qmp_socket,
            regions=[records.record_of(region) for region in workload.regions],
            userfaults={},
            prefetch=self.options.prefetch,
            eager=self.options.eager,
        )
        serving = asyncio.ensure_future(self._pager.serve(self.folder, work))
        serving.add_done_callback(_retrieve)
        await workload.prepare_load()
        try:
            await serving
        except CannotHandleFaults as refused:
            self._times.phase("load")
            self._loaded = str(refused), await self._load(work, str(refused), image)

    async def _check(self, workload: QemuWorkload, image: Opened) -> None:
        """Raise UsageError if the image is not that of a guest, RestoreError if the machine does not match the image,
        DisksDiffer if its disks do not."""
        found = image.metadata
        if found.kind != "qemu" or not found.restorable:
            raise UsageError(
                f"cannot restore {self.path} as a QEMU guest: it is an image of {found.name}, a "
                f"workload of kind {found.kind}"
            )
        try:
            await workload.check_image(found.details, str(self.path), disks_as_is=self._disks.as_is)
            self._identity.check(workload, found.details)
        except DisksDiffer as error:
            raise DisksDiffer(f"cannot restore {self.folder.name}: {error}") from error
        except WorkloadError as error:
            raise RestoreError(f"cannot restore {self.folder.name}: {error}") from error

    def _choose_run_state(self, workload: QemuWorkload) -> None:
        """Choose whether `resume` leaves the guest paused. Raises RestoreError if the guest cannot run with its
        state."""
        if self.options.paused:
            workload.choose_paused(True)
        elif self.options.resume:
            try:
                workload.choose_paused(False)
            except WorkloadError as error:
                raise RestoreError(f"cannot resume {self.folder.name} from {self.path}: {error}") from error

    async def _load(self, work: Deferred, reason: str, image: Opened) -> Loading:
        self.listener(EagerEvent(image=str(self.path), length=image.pages * SMALL_PAGE, reason=reason))
        report = reporter(self.listener)
        async for progress in self._pager.load(work):
            report(progress.deferred, progress.prefetched, progress.bytes_read)
        return progress

    async def _withdraw(self) -> None:
        """End the pager, and then the guest, which was not restored."""
        await in_thread(self._pager.give_up)
        await self.discard()

    # -- while the guest runs

    async def _running(self, image: Opened, paused: bool) -> RestoreResult:
        """Detach from the pager, emit events, and return the result so far."""
        result = self._result(image, paused)
        if self.options.memory == "shared":
            base = await self._pager.base_status()
            result = msgspec.structs.replace(result, deferred=base.deferred, bytes_read=base.bytes_read)
            self._pager.leave()
            self._emit_running(result)
            return result
        if self._loaded is not None:
            self._pager.close()
            self._emit_running(result)
            return result
        status = await in_thread(client.ask, self.folder, PagerRequest(what="touched")) or _last_words(self.folder, 0)
        self._pager.leave()
        if status is not None:
            result = _updated(result, status)
        self._emit_running(result)
        if status is not None:
            self.listener(TouchedEvent(windows=status.touched))
        return result

    def _emit_running(self, result: RestoreResult) -> None:
        self.listener(
            RunningEvent(
                workload=self.folder.name,
                time_to_running=result.time_to_running,
                deferred=result.deferred,
                paused=result.paused,
                was_paused=result.was_paused,
            )
        )

    def _time_parts(self, image: Opened) -> TimeToRunning:
        phases = {name: seconds * 1e3 for name, seconds in self._times.phases.items() if name}
        return TimeToRunning(total=sum(phases.values()), open_image=image.seconds * 1e3, **phases)

    def _result(self, image: Opened, paused: bool) -> RestoreResult:
        times = self._time_parts(image)
        reason, loaded = self._loaded or (None, None)
        return RestoreResult(
            status="active" if loaded is None else "completed",
            workload=self.folder.name,
            image=str(self.path.absolute()),
            paused=paused,
            was_paused=self._was_paused,
            time_to_running=times.total - times.qemu_start,
            time_parts=times,
            memory=sum(region.length for region in image.metadata.regions),
            deferred=0,
            faults=0,
            missed=0,
            prefetched=loaded.prefetched if loaded is not None else 0,
            bytes_read=loaded.bytes_read if loaded is not None else 0,
            service_us=0.0,
            longest_us=0.0,
            service_times=Latency.of([], 0.0),
            eager_reason=reason,
            overlays=self._disks.overlays,
        )


def _retrieve(reply: asyncio.Future[Any]) -> None:
    """Retrieve the error of a reply that is no longer awaited. Otherwise, asyncio would report it."""
    if not reply.cancelled():
        reply.exception()


async def completed(folder: Folder, result: RestoreResult, listener: Listener) -> RestoreResult:
    """Wait until all memory is loaded, emitting the progress, and return the final result. Raises RestoreError if the
    pager has exited."""
    begun, known, finished = result, 0, False
    while not finished:
        status = await in_thread(client.ask, folder, PagerRequest(what="touched", first=known))
        if status is None:
            status = _last_words(folder, known)
        if status is None:
            break
        if status.touched:
            known += len(status.touched)
            listener(TouchedEvent(windows=status.touched))
        result, finished = _updated(begun, status), status.finished
        listener(
            ProgressEvent(
                deferred=result.deferred,
                faults=result.faults,
                missed=result.missed,
                prefetched=result.prefetched,
                bytes_read=result.bytes_read,
                failures=status.failures,
            )
        )
        await asyncio.sleep(0 if finished else _POLL)
    return msgspec.structs.replace(result, status="completed", deferred=0)


def _last_words(folder: Folder, known: int) -> PagerStatus | None:
    """Return the summary that the pager wrote when it finished, without the first `known` windows; None if there is
    none."""
    status = folder.load(records.SUMMARY, PagerStatus)
    return msgspec.structs.replace(status, touched=status.touched[known:]) if status is not None else None


def _updated(before: RestoreResult, status: PagerStatus) -> RestoreResult:
    """Return the result with the statistics of the pager."""
    longest = status.longest * 1e6
    return msgspec.structs.replace(
        before,
        deferred=status.deferred,
        faults=status.faults,
        missed=status.missed,
        prefetched=status.prefetched,
        bytes_read=status.bytes_read,
        service_us=status.service * 1e6 / max(status.faults, 1),
        longest_us=longest,
        service_times=Latency.of(status.histogram, longest),
    )
