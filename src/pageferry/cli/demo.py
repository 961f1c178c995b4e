"""`pageferry demo`: migrate the built-in workload between two processes of this host."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options, given
from pageferry.demo.run import DemoOptions, demonstrate
from pageferry.migration.options import Options
from pageferry.report.migration import DemoView
from pageferry.report.reporter import open_reporter


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Start a workload that writes to memory continuously and records every write. Migrate it to another process "
        "while it writes, let it run there, and compare every page with the records. Takes a few seconds."
    )
    add_options(parser, DemoOptions)
    add_options(parser, Options)


async def run(args: argparse.Namespace) -> int:
    """Migrate the workload once and verify its memory."""
    with open_reporter(args.output, DemoView()) as out:
        workload = DemoOptions(**given(args, DemoOptions))
        result = await demonstrate(workload, out.event, given(args, Options))
        out.final(result)
    return 0 if result.intact else 1
