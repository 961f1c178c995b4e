"""`pageferry run`: start a QEMU guest under management."""

from __future__ import annotations

import argparse
from logging import getLogger

from pageferry.cli.foreground import see_to_the_end
from pageferry.cli.list import describe
from pageferry.errors import UsageError, WorkloadError
from pageferry.report.reporter import open_reporter
from pageferry.report.workloads import WorkloadsView
from pageferry.workloads.qemu import QemuWorkload

TAKES_COMMAND = True

log = getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Name, options, and after `--` the command line of QEMU."""
    parser.description = (
        "Start an unmodified QEMU under management: its memory in a shared file with large pages, and a monitor of "
        "ours. Without --detach it stays on the terminal, and Ctrl-C ends it."
    )
    parser.add_argument("name", metavar="NAME", help="what to call the guest on this host")
    parser.add_argument("--detach", action="store_true", help="return when the guest runs; its output goes to a log")
    parser.add_argument("--hugetlb", action="store_true", help="guest memory in reserved 2 MiB pages (hugetlbfs)")
    parser.usage = "pageferry run NAME [options] -- QEMU ARGS..."


async def run(args: argparse.Namespace) -> int:
    """Start the guest, and see it to its end unless it is detached."""
    if not args.command:
        raise UsageError("give the QEMU command line after --, program first")
    workload = await QemuWorkload.start(args.name, args.command, detach=args.detach, hugetlb=args.hugetlb)
    if args.detach:
        with open_reporter(args.output, WorkloadsView()) as reporter:
            reporter.final(await describe(workload))
        workload.close()
        return 0
    log.info("%s runs as process %d", args.name, workload.pid)
    if code := await see_to_the_end(workload):
        raise WorkloadError(f"{args.name}: {args.command[0]} ended with exit code {code}")
    return 0
