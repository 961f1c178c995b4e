"""`pageferry adopt`: register a QEMU guest that is already running."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.cli.options import given
from pageferry.control.adopting import adopt_async
from pageferry.control.options import AdoptOptions
from pageferry.report.reporter import open_reporter


async def run(args: argparse.Namespace) -> int:
    """Register the guest and print its entry."""
    adopted = await adopt_async(args.name, **given(args, AdoptOptions))
    with open_reporter(args.output, lambda: report.WorkloadsView()) as reporter:
        reporter.final(adopted)
    return 0
