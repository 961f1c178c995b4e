"""`pageferry run`: start a QEMU guest under management."""

from __future__ import annotations

import argparse
from logging import getLogger

from pageferry.cli.foreground import GuestOptions, run_in_foreground
from pageferry.cli.list import describe
from pageferry.cli.options import add_options
from pageferry.errors import UsageError, WorkloadError
from pageferry.report.reporter import open_reporter
from pageferry.report.workloads import WorkloadsView
from pageferry.workloads.qemu.guest import QemuWorkload

TAKES_COMMAND = True

log = getLogger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb; the command line of QEMU follows `--`."""
    parser.description = (
        "Start an unmodified QEMU under management: its memory is in a shared file with huge pages, and pageferry adds "
        "a QMP monitor. Without --detach it stays attached to the terminal, and Ctrl-C ends it."
    )
    parser.add_argument("name", metavar="NAME", help="name of the guest on this host")
    add_options(parser, GuestOptions)
    parser.usage = "pageferry run NAME [options] -- QEMU ARGS..."


async def run(args: argparse.Namespace) -> int:
    """Start the guest, and wait until it exits unless it is detached."""
    if not args.command:
        raise UsageError("the command line of QEMU is missing: give NAME -- QEMU ARGS...")
    workload = await QemuWorkload.start(args.name, args.command, detach=args.detach, hugetlb=args.hugetlb)
    if args.detach:
        with open_reporter(args.output, WorkloadsView()) as reporter:
            reporter.final(await describe(workload))
        workload.close()
        return 0
    log.info("%s: running as process %d", args.name, workload.pid)
    if code := await run_in_foreground(workload):
        raise WorkloadError(f"{args.name}: {args.command[0]} ended with exit code {code}; see its output for the cause")
    return 0
