"""Restores QEMU guests from images: a guest runs at once, and its memory is loaded on demand (S10)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import msgspec

from pageferry._engine import Pager
from pageferry.checkpoints.eager import load_guest
from pageferry.checkpoints.events import ProgressEvent, RestoreResult, RunningEvent, TimeToRunning, TouchedEvent
from pageferry.errors import PageferryError, RestoreError, UsageError, WorkloadError
from pageferry.events import Latency, Listener, ignore
from pageferry.host.blocking import in_thread
from pageferry.host.registry import Folder, Registry
from pageferry.images import targets
from pageferry.images.image import ImageFile
from pageferry.pager import client, records
from pageferry.pager.launcher import hand_over
from pageferry.pager.page_faults import CannotHandleFaults
from pageferry.pager.process import GuestPager
from pageferry.pager.protocol import PagerRequest, PagerStatus
from pageferry.pager.records import Deferred
from pageferry.workloads.qemu.guest import QemuWorkload

_POLL = 0.2
"""Interval at which the progress is polled, seconds."""


_CLOSE_TIMEOUT = 0.3
"""Maximum time for a pager in this process to end after an error, seconds."""


async def restore_guest(
    name: str,
    path: str | Path,
    arguments: Sequence[str],
    *,
    eager: bool = False,
    prefetch: bool = True,
    detach: bool = True,
    hugetlb: bool = False,
    listener: Listener = ignore,
    registry: Registry | None = None,
) -> tuple[QemuWorkload, RestoreResult]:
    """Start QEMU from the user's command line, and resume the guest at once where the image was taken.

    Its memory is loaded on demand by a separate process that outlives this one; the result has the time until the guest
    ran. `eager`: the background fill does not yield to accesses; `prefetch=False`: there is none. If page faults of
    QEMU cannot be handled, all memory is loaded before the guest runs, and the result has the reason.

    Raises ImageError, UsageError (not an image of a guest), RestoreError (it does not match this guest), and the errors
    of `QemuWorkload.start`; nothing is left behind then.
    """
    begin = time.monotonic()
    opening = asyncio.ensure_future(in_thread(_open, path))  # faster than the start of QEMU
    try:
        workload = await QemuWorkload.start(
            name, arguments, incoming=True, at_once=True, detach=detach, hugetlb=hugetlb, registry=registry
        )
    except asyncio.CancelledError:
        raise  # do not wait for the image: its disk may not respond
    except BaseException:
        (opened,) = await asyncio.gather(opening, return_exceptions=True)
        if isinstance(opened, PageferryError):  # an invalid image is the more useful error
            raise opened from None
        raise
    started = time.monotonic()
    first: GuestPager | None = None
    reason: str | None = None
    try:
        image, state, open_image = await opening
        _compare(image, workload)
        folder = (registry or Registry()).folder(name)
        try:
            first = await _adopt(workload, image, folder, _work(image, workload, prefetch, eager))
        except CannotHandleFaults as refused:
            reason = str(refused)
        adopted = time.monotonic()
        if reason is not None:
            filled = await load_guest(image, targets.targets(image, workload.regions), reason, listener)
        present = time.monotonic()
        await workload.load_state(state)
        loaded = time.monotonic()
        paused = workload.stays_paused
        await workload.resume()
    except BaseException:
        await asyncio.shield(_withdraw(workload, first))
        raise
    running = time.monotonic()
    times = TimeToRunning(
        total=(running - begin) * 1e3,
        qemu_start=(started - begin) * 1e3,
        open_image=open_image * 1e3,
        adopt=(adopted - started) * 1e3,
        load=(present - adopted) * 1e3,
        device_state=(loaded - present) * 1e3,
        resume=(running - loaded) * 1e3,
    )
    ran = times.total - times.qemu_start
    if first is None:
        listener(RunningEvent(workload=name, time_to_running=ran, deferred=0, paused=paused))
        return workload, _loaded(_result(name, image, times, paused), filled, reason)
    left = first.server.status().deferred
    listener(RunningEvent(workload=name, time_to_running=ran, deferred=left, paused=paused))
    try:
        last = await hand_over(first)
    except asyncio.CancelledError:
        await asyncio.shield(_withdraw(workload, first))
        raise
    listener(TouchedEvent(windows=last.touched))
    return workload, _updated(_result(name, image, times, paused), last)


async def _withdraw(workload: QemuWorkload, first: GuestPager | None) -> None:
    """End a guest that was not restored. Its pager ends first, unless it waits for a disk that does not respond."""
    if first is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await in_thread(first.close)
    await workload.discard()


def _open(path: str | Path) -> tuple[ImageFile, bytes, float]:
    """Open an image of a guest. Return it, its device state, and the seconds taken. Raises ImageError, UsageError."""
    begin = time.monotonic()
    image = ImageFile(path)
    found = image.metadata
    if found.kind != "qemu" or not found.restorable:
        raise UsageError(
            f"cannot restore {image.path} as a QEMU guest: it is of {found.name}, a workload of kind {found.kind}"
        )
    return image, image.state(), time.monotonic() - begin


def _compare(image: ImageFile, workload: QemuWorkload) -> None:
    """Raise RestoreError if the machine or its memory does not match the image."""
    try:
        workload.check_image(image.metadata.details, str(image.path))
    except WorkloadError as error:
        raise RestoreError(f"cannot restore {workload.name}: {error}") from error
    targets.compare(image, workload.regions)


async def _adopt(workload: QemuWorkload, image: ImageFile, folder: Folder, work: Deferred) -> GuestPager:
    """Start a pager in this process, while QEMU prepares to load its state. It is closed if that fails.

    It serves until the separate pager process has started, which takes much longer than the rest of the restore.
    """
    making = asyncio.ensure_future(in_thread(GuestPager, image, folder, work))
    try:
        await workload.prepare_load()
        return await asyncio.shield(making)
    except BaseException:
        await asyncio.wait({making}, timeout=_CLOSE_TIMEOUT)
        if making.done() and making.exception() is None:
            making.result().close()
        raise


async def completed(folder: Folder, result: RestoreResult, listener: Listener) -> RestoreResult:
    """Wait until all memory is loaded; return the final result. Raises RestoreError if the pager has exited."""
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
    """Return the summary that the pager has left when it finished."""
    status = folder.load(records.SUMMARY, PagerStatus)
    return msgspec.structs.replace(status, touched=status.touched[known:]) if status is not None else None


def _work(image: ImageFile, workload: QemuWorkload, prefetch: bool, eager: bool) -> Deferred:
    regions = [records.record_of(region) for region in workload.regions]
    return Deferred(
        image=str(image.path.absolute()),
        identity=image.identity,
        qmp_socket=workload.qmp_socket,
        regions=regions,
        userfaults={},
        prefetch=prefetch,
        eager=eager,
    )


def _result(name: str, image: ImageFile, times: TimeToRunning, paused: bool) -> RestoreResult:
    return RestoreResult(
        status="active",
        workload=name,
        image=os.fspath(image.path.absolute()),
        paused=paused,
        time_to_running=times.total - times.qemu_start,
        time_parts=times,
        memory=sum(region.length for region in image.metadata.regions),
        deferred=0,
        faults=0,
        missed=0,
        prefetched=0,
        bytes_read=0,
        service_us=0.0,
        longest_us=0.0,
        service_times=Latency.of([], 0.0),
    )


def _loaded(before: RestoreResult, pager: Pager, reason: str | None) -> RestoreResult:
    """Return the result for a pager that has loaded everything before the guest ran."""
    _, _, _, prefetched, bytes_read, _, _ = pager.counters
    return msgspec.structs.replace(
        before, status="completed", prefetched=prefetched, bytes_read=bytes_read, eager_reason=reason
    )


def _updated(before: RestoreResult, status: PagerStatus) -> RestoreResult:
    """Add the statistics of a pager to those of the pagers before it."""
    faults = before.faults + status.faults
    longest = max(before.longest_us, status.longest * 1e6)
    bins = [one + other for one, other in zip_longest(before.service_times.bins, status.histogram, fillvalue=0)]
    return msgspec.structs.replace(
        before,
        deferred=status.deferred,
        faults=faults,
        missed=before.missed + status.missed,
        prefetched=before.prefetched + status.prefetched,
        bytes_read=before.bytes_read + status.bytes_read,
        service_us=(before.service_us * before.faults + status.service * 1e6) / max(faults, 1),
        longest_us=longest,
        service_times=Latency.of(bins, longest),
    )
