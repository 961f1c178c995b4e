"""`pageferry run`: start a QEMU guest under management."""

from __future__ import annotations

import argparse
from logging import getLogger

from pageferry import report
from pageferry.cli.foreground import run_in_foreground
from pageferry.errors import UsageError
from pageferry.report.reporter import open_reporter
from pageferry.workloads.inventory import describe
from pageferry.workloads.qemu.guest import QemuWorkload

log = getLogger(__name__)


async def run(args: argparse.Namespace) -> int:
    """Start the guest, and unless `--detach` is given, wait until it exits. Raises WorkloadError if QEMU
    fails or is killed."""
    if not args.command:
        raise UsageError("cannot start a guest: the command line of QEMU is missing; give NAME -- QEMU ARGS...")
    workload = await QemuWorkload.start(args.name, args.command, detach=args.detach, hugetlb=args.hugetlb)
    if args.detach:
        with open_reporter(args.output, lambda: report.WorkloadsView()) as reporter:
            reporter.final(await describe(workload))
        workload.close()
        return 0
    log.info("%s: running as process %d", args.name, workload.pid)
    await run_in_foreground(workload, args.command[0])
    return 0
