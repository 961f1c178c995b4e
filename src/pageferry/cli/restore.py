"""`pageferry restore`: let a QEMU guest go on where an image was taken."""

from __future__ import annotations

import argparse
import asyncio
from logging import getLogger

from pageferry.checkpoints.restore import completed, restore_guest, take_over
from pageferry.checkpoints.restore_events import RestoreResult
from pageferry.cli.foreground import see_to_the_end
from pageferry.errors import RestoreError, UsageError, WorkloadError
from pageferry.host.registry import Registry
from pageferry.report.reporter import Reporter, open_reporter
from pageferry.report.restore import RestoreView
from pageferry.workloads.qemu import QemuWorkload

TAKES_COMMAND = True
WORKS_ON = "name"

log = getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Name, image, options, and after `--` the command line of QEMU."""
    parser.description = (
        "Starts a QEMU that goes on where the image was taken. It runs at once; its memory is read on access, and in "
        "the background. Without --detach it stays on the terminal, and Ctrl-C ends it. The image is only read, and "
        "must stay where it is until `pageferry list` shows that nothing is deferred any more."
    )
    parser.add_argument("name", metavar="NAME", help="what to call the guest on this host")
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="image that `pageferry checkpoint` wrote")
    parser.add_argument("--detach", action="store_true", help="return when the guest runs; its output goes to a log")
    parser.add_argument("--hugetlb", action="store_true", help="guest memory in reserved 2 MiB pages (hugetlbfs)")
    parser.add_argument("--eager", action="store_true", help="read in the background without giving way to accesses")
    parser.add_argument("--no-prefetch", action="store_true", help="read nothing but what is accessed")
    parser.add_argument(
        "--takeover",
        action="store_true",
        help="serve a guest whose pager has died and that waits; IMAGE says where the image is now, if it has moved",
    )
    parser.usage = "pageferry restore NAME IMAGE [options] -- QEMU ARGS..."


async def run(args: argparse.Namespace) -> int:
    """Restore, or take over."""
    with open_reporter(args.output, RestoreView()) as reporter:
        if args.takeover:
            return await _take_over(args, reporter)
        if args.image is None or not args.command:
            raise UsageError("give NAME, IMAGE and, after --, the QEMU command line, program first")
        workload, result = await restore_guest(
            args.name,
            args.image,
            args.command,
            eager=args.eager,
            prefetch=not args.no_prefetch,
            detach=args.detach,
            hugetlb=args.hugetlb,
            listener=reporter.event,
        )
        if args.detach:
            reporter.final(result)
            workload.close()
            return 0
        return await _attend(args, workload, result, reporter)


async def _attend(args: argparse.Namespace, workload: QemuWorkload, result: RestoreResult, reporter: Reporter) -> int:
    """Stay with the guest: report when its memory is there, and see it to its end."""
    arrival = asyncio.ensure_future(_report_arrival(args.name, result, reporter))
    try:
        code = await see_to_the_end(workload)
    finally:
        arrival.cancel()
    if code:
        raise WorkloadError(f"{args.name}: {args.command[0]} ended with exit code {code}")
    return 0


async def _report_arrival(name: str, result: RestoreResult, reporter: Reporter) -> None:
    try:
        reporter.final(await completed(Registry().folder(name), result, reporter.event))
    except (RestoreError, WorkloadError) as error:
        log.error("%s", error)


async def _take_over(args: argparse.Namespace, reporter: Reporter) -> int:
    status = await take_over(Registry().folder(args.name), args.image)
    if status is not None:
        reporter.final(status)
    return 0
