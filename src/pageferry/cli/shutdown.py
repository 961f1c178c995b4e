"""`pageferry shutdown`: shut down a guest, and wait until its QEMU has exited."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.cli.options import given
from pageferry.control.options import ShutdownOptions
from pageferry.control.shutdown import shutdown_async
from pageferry.report.reporter import open_reporter


async def run(args: argparse.Namespace) -> int:
    """Shut down the guest, and print the result."""
    with open_reporter(args.output, lambda: report.ControlView()) as reporter:
        reporter.final(await shutdown_async(args.name, **given(args, ShutdownOptions)))
    return 0
