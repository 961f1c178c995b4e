"""`pageferry restore`: start a QEMU guest from an image, loading its memory on demand.

The pager process is started before the modules of a restore are imported, so that both happen at the same time.
"""

from __future__ import annotations

import argparse
import asyncio
from logging import getLogger
from typing import TYPE_CHECKING

from pageferry import report
from pageferry.cli.foreground import run_in_foreground
from pageferry.errors import RestoreError, UsageError, WorkloadError
from pageferry.host.registry import Registry
from pageferry.pager.events import TakenOver
from pageferry.pager.launcher import PagerProcess, take_over
from pageferry.report.reporter import Reporter, open_reporter

if TYPE_CHECKING:
    from pageferry.checkpoints.events import RestoreResult
    from pageferry.workloads.qemu.guest import QemuWorkload

log = getLogger(__name__)


async def run(args: argparse.Namespace) -> int:
    """Restore the guest, or with `--takeover` start another pager for a guest that has been restored."""
    with open_reporter(args.output, lambda: report.RestoreView()) as reporter:
        if args.takeover:
            return await _take_over(args, reporter)
        if args.paused and args.resume:
            raise UsageError("--paused cannot be combined with --resume: remove one of them")
        if args.image is None or not args.command:
            raise UsageError("IMAGE or the command line is missing: give NAME IMAGE -- QEMU ARGS...")
        pager = PagerProcess()
        try:
            return await _restore(args, reporter, pager)
        except BaseException:
            pager.close()
            raise


async def _restore(args: argparse.Namespace, reporter: Reporter, pager: PagerProcess) -> int:
    from pageferry.checkpoints.restore_guest import restore_guest

    workload, result = await restore_guest(
        args.name,
        args.image,
        args.command,
        eager=args.eager,
        prefetch=not args.no_prefetch,
        detach=args.detach,
        hugetlb=args.hugetlb,
        disks=args.disks,
        paused=args.paused,
        resume=args.resume,
        listener=reporter.event,
        pager=pager,
    )
    if args.detach:
        reporter.final(result)
        workload.close()
        return 0
    return await _run_in_foreground(args, workload, result, reporter)


async def _run_in_foreground(
    args: argparse.Namespace, workload: QemuWorkload, result: RestoreResult, reporter: Reporter
) -> int:
    """Wait until the guest exits, and report when all of its memory is loaded. Raises WorkloadError if QEMU
    fails or is killed."""
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
    status = await take_over(Registry().folder(args.name), args.image)
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
