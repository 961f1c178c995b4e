"""`pageferry adopt`: register a QEMU guest that is already running."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.report.reporter import open_reporter
from pageferry.workloads.inventory import describe
from pageferry.workloads.qemu.guest import QemuWorkload


async def run(args: argparse.Namespace) -> int:
    """Register the guest and print its entry."""
    workload = await QemuWorkload.adopt(args.name, args.qmp)
    try:
        with open_reporter(args.output, lambda: report.WorkloadsView()) as reporter:
            reporter.final(await describe(workload))
    finally:
        workload.close()
    return 0
