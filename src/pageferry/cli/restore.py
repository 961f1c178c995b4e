"""`pageferry restore`: start a QEMU guest from an image, loading its memory on demand.

The pager process is started before the modules of a restore are imported, so that both happen at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from contextlib import AbstractAsyncContextManager
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from pageferry import report
from pageferry.cli.foreground import run_in_foreground
from pageferry.cli.options import given, refuse_others
from pageferry.errors import RestoreError, UsageError, WorkloadError
from pageferry.host.registry import Registry
from pageferry.pager.base_records import find_program
from pageferry.pager.events import TakenOver
from pageferry.pager.launcher import PagerConnection, PagerProcess, connect_to_base, take_over, take_over_base
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.stores.options import OpenOptions

if TYPE_CHECKING:
    from pageferry.checkpoints.events import RestoreResult
    from pageferry.pager.protocol import PagerStatus
    from pageferry.workloads.qemu.guest import QemuWorkload

log = getLogger(__name__)


async def run(args: argparse.Namespace) -> int:
    """Restore the guest, or with `--takeover` start another pager for a guest that has been restored."""
    with open_reporter(args.output, lambda: report.RestoreView()) as reporter:
        if args.takeover:
            refuse_others(args, ("name", "image", "takeover"), "with --takeover")
            return await _take_over(args, reporter)
        if args.paused and args.resume:
            raise UsageError("--paused cannot be combined with --resume: remove one of them")
        if args.image is None or not args.command:
            raise UsageError(
                "cannot restore a guest: IMAGE or the command line is missing; give NAME IMAGE -- QEMU ARGS..."
            )
        async with _local(args) as image:
            pager = _pager(args, image)
            try:
                workload, result = await _restore(args, image, reporter, pager)
            except BaseException:
                pager.close()
                raise
        if args.detach:
            reporter.final(result)
            workload.close()
            return 0
        return await _run_in_foreground(args, workload, result, reporter)


def _local(args: argparse.Namespace) -> AbstractAsyncContextManager[str | Path]:
    """Return the context in which the image is available as a file."""
    keys = OpenOptions(**given(args, OpenOptions))
    if "://" not in args.image and keys == OpenOptions():
        return contextlib.nullcontext(args.image)
    from pageferry.checkpoints.image_source import local_image_async

    return local_image_async("image", args.image, keys)


def _pager(args: argparse.Namespace, image: str | Path) -> PagerConnection:
    """Connect to the pager of the image's base, if the memory is shared and the pager is running; otherwise start a
    pager."""
    running = connect_to_base(Registry(), image) if args.memory == "shared" else None
    return running if running is not None else PagerProcess()


async def _restore(
    args: argparse.Namespace, image: str | Path, reporter: Reporter, pager: PagerConnection
) -> tuple[QemuWorkload, RestoreResult]:
    from pageferry.checkpoints.restore_guest import restore_guest

    return await restore_guest(
        args.name,
        image,
        args.command,
        eager=args.eager,
        prefetch=not args.no_prefetch,
        detach=args.detach,
        hugetlb=args.hugetlb,
        memory=args.memory,
        disks=args.disks,
        paused=args.paused,
        resume=args.resume,
        guid=args.guid,
        clock=args.clock,
        listener=reporter.event,
        pager=pager,
    )


async def _run_in_foreground(
    args: argparse.Namespace, workload: QemuWorkload, result: RestoreResult, reporter: Reporter
) -> int:
    """Wait until the guest exits, and report when all of its memory is loaded. Raises WorkloadError if QEMU
    fails or is killed."""
    if args.memory == "shared":  # other clones may load the base, which is not a part of this guest
        reporter.final(result)
        await run_in_foreground(workload, args.command[0])
        return 0
    completion = asyncio.ensure_future(_report_completion(args.name, result, reporter))
    try:
        await run_in_foreground(workload, args.command[0])
    finally:
        completion.cancel()
    return 0


async def _report_completion(name: str, result: RestoreResult, reporter: Reporter) -> None:
    from pageferry.checkpoints.restore_guest import completed

    try:
        reporter.final(await completed(Registry().folder(name), result, reporter.event))
    except (RestoreError, WorkloadError) as error:
        log.error("%s", error)


async def _take_over(args: argparse.Namespace, reporter: Reporter) -> int:
    registry = Registry()
    program = find_program(registry, args.name)
    if program is not None:
        status: PagerStatus | None = await take_over_base(registry, args.name, program.record, args.image)
    else:
        status = await take_over(registry.folder(args.name), args.image)
    if status is not None:
        result = TakenOver(
            workload=args.name,
            image=status.image,
            pager=status.pager,
            deferred=status.deferred,
            failures=status.failures,
        )
        reporter.final(result)
    return 0
