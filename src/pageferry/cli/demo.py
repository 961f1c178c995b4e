"""`pageferry demo`: migrate the built-in workload between two processes of this host."""

from __future__ import annotations

import argparse

from pageferry import report
from pageferry.cli.options import given
from pageferry.demo.options import DemoOptions
from pageferry.demo.run import demonstrate
from pageferry.migration.options import Options
from pageferry.report.reporter import open_reporter


async def run(args: argparse.Namespace) -> int:
    """Migrate the workload once and verify its memory."""
    with open_reporter(args.output, lambda: report.DemoView()) as out:
        workload = DemoOptions(**given(args, DemoOptions))
        result = await demonstrate(workload, out.event, given(args, Options))
        out.final(result)
    return 0 if result.intact else 1
