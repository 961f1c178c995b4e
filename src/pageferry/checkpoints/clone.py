"""Clones: several guests that are started from one image at the same time (S10)."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from pageferry import values
from pageferry.checkpoints.clone_options import CloneArguments, CloneOptions
from pageferry.checkpoints.events import CloneInfo, CloneResult
from pageferry.checkpoints.image_source import local_image_async
from pageferry.checkpoints.restore_guest import GuestRestore, open_restore, start_pager
from pageferry.checkpoints.restore_options import GuestOptions
from pageferry.errors import UsageError, WorkloadDied
from pageferry.events import Listener, ignore
from pageferry.host.blocking import in_thread, synchronous
from pageferry.host.registry import Registry
from pageferry.pager.launcher import PagerConnection
from pageferry.workloads.inventory import private_pages
from pageferry.workloads.qemu import generation_id
from pageferry.workloads.qemu.guest import QemuWorkload

log = logging.getLogger(__name__)


async def clone_async(
    path: str | Path, arguments: Sequence[str], *, listener: Listener = ignore, **options: Unpack[CloneArguments]
) -> CloneResult:
    """Start several guests from the image at `path`, or from an image in a store, given its URL, detached, and return
    when all of them run.

    `arguments` is the command line of QEMU, program first, in which {n} and {name} stand for the number and the name of
    the guest. `options` are the fields of `pageferry.checkpoints.clone_options.CloneOptions`: `count`, `name`,
    `memory`, `eager`, `prefetch`, `disks`, `clock`, and for an image in a store `key`, `key_command`, `allow_plain`. If
    a guest cannot be started, all are terminated.

    Raises the errors of `pageferry restore`; UsageError if two guests would listen on one address, before a guest is
    started; RestoreError if two guests have the same generation ID; UnsupportedError if the memory of the image cannot
    be shared.

    Examples:
        >>> import pageferry
        >>> qemu = ["qemu-system-x86_64", "-m", "64M", "-display", "none"]
        >>> info = pageferry.run_guest("web", qemu)
        >>> result = pageferry.checkpoint_guest("web", "web.img")
        >>> result = pageferry.clone("web.img", qemu, count=2, name="web-{n}")
        >>> [one.name for one in result.clones]
        ['web-1', 'web-2']
        >>> for name in ("web", "web-1", "web-2"):
        ...     pageferry.stop(name)
    """
    chosen = values.options(CloneOptions, options)
    command = values.texts("arguments", arguments)
    values.function("listener", listener)
    if not command:
        raise UsageError("invalid `arguments`: expected the command line of QEMU, not an empty list")
    workloads, result = await start_clones(path, command, chosen, listener)
    for workload in workloads:
        workload.close()
    return result


clone = synchronous(clone_async)


@dataclass(frozen=True, slots=True)
class _Start:
    """Start of the guests of one image. Times are counted from the creation of this object."""

    path: Path
    options: CloneOptions
    listener: Listener
    slots: asyncio.Semaphore
    """Semaphore that limits the number of starts at the same time."""
    begun: float = field(default_factory=time.monotonic)
    restores: list[GuestRestore] = field(default_factory=list)
    """Restores of the guests, including those that failed."""

    @property
    def elapsed(self) -> float:
        """Time since the start began, milliseconds."""
        return (time.monotonic() - self.begun) * 1e3

    async def guest(self, name: str, command: Sequence[str]) -> tuple[QemuWorkload, float]:
        """Start one guest. Return it, and the time until it ran, milliseconds."""
        chosen = self.options
        async with self.slots:
            restore = open_restore(
                name,
                self.path,
                listener=self.listener,
                memory=chosen.memory,
                eager=chosen.eager,
                prefetch=chosen.prefetch,
                disks=chosen.disks,
                clock=chosen.clock,
            )
            self.restores.append(restore)
            workload, _ = await restore.run(command)
        return workload, self.elapsed

    async def withdraw(self, starts: Sequence[asyncio.Future[Any]]) -> None:
        """Cancel the starts that are in progress, terminate the guests that run, and remove their overlays."""
        for start in starts:
            start.cancel()
        await asyncio.gather(*starts, return_exceptions=True)
        ended = await asyncio.gather(*(restore.discard() for restore in self.restores), return_exceptions=True)
        for error in ended:
            if error is not None:
                log.error("%s: cannot end all guests: %s", self.path, error)


async def start_clones(
    path: str | Path, arguments: Sequence[str], options: CloneOptions, listener: Listener
) -> tuple[list[QemuWorkload], CloneResult]:
    """Start the guests, and return them with the result. Raises the same errors as `clone_async`."""
    commands = options.commands(arguments)
    async with local_image_async("path", path, options) as image:
        return await _start_clones(image, commands, options, listener)


async def _start_clones(
    path: Path, commands: Sequence[tuple[str, Sequence[str]]], options: CloneOptions, listener: Listener
) -> tuple[list[QemuWorkload], CloneResult]:
    start = _Start(path, options, listener, asyncio.Semaphore(os.cpu_count() or 1))
    base = await _base(start.path) if options.memory == "shared" else None
    starts = [asyncio.ensure_future(start.guest(*one)) for one in commands]
    try:
        started = await asyncio.gather(*starts)
        elapsed = start.elapsed
        generation_id.check_clones((workload.name, workload.generation_id) for workload, _ in started)
        clones = [await in_thread(_info, *one) for one in started]
    except BaseException:
        await asyncio.shield(start.withdraw(starts))
        raise
    finally:
        if base is not None:
            base.close()
    result = CloneResult(image=str(path), memory=options.memory, time_to_all_running=elapsed, clones=clones)
    return [workload for workload, _ in started], result


async def _base(path: Path) -> PagerConnection:
    """Start the pager of the base, or connect to it, so that all guests use the same one."""
    registry = Registry()
    pager = start_pager(registry, path, GuestOptions(memory="shared"))
    try:
        await pager.open(path, path.name)
        await pager.open_base(registry)
    except BaseException:
        pager.give_up()
        raise
    return pager


def _info(workload: QemuWorkload, running: float) -> CloneInfo:
    return CloneInfo(name=workload.name, pid=workload.pid, time_to_running=running, private=_private(workload))


def _private(workload: QemuWorkload) -> int | None:
    """Return the memory of a guest that no other guest shares, bytes; None if its QEMU has exited."""
    record = workload.clone
    if record is None:
        return sum(os.fstat(region.fd).st_blocks * 512 for region in workload.regions)
    try:
        return private_pages(record)
    except WorkloadDied:
        return None
