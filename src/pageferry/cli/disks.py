"""`pageferry disks`: write overlays back to the disks that a checkpoint has frozen."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.cli.options import given
from pageferry.control.disks import commit_disks_async
from pageferry.control.options import CommitOptions
from pageferry.report.reporter import open_reporter


async def run(args: argparse.Namespace) -> int:
    """Write the overlays back, and print the result."""
    with open_reporter(args.output, lambda: report.DisksView()) as reporter:
        reporter.final(await commit_disks_async(args.name, listener=reporter.event, **given(args, CommitOptions)))
    return 0
