"""`pageferry top`: show workloads and running operations, refreshed periodically."""

from __future__ import annotations

import argparse
import asyncio

from pageferry import report
from pageferry.cli.options import refuse
from pageferry.host.blocking import in_thread
from pageferry.report.reporter import open_reporter
from pageferry.workloads.events import Overview
from pageferry.workloads.inventory import overview


async def run(args: argparse.Namespace) -> int:
    """Show the workloads once with `--once`, otherwise periodically until cancelled."""
    if args.once:
        refuse(args, ("interval",), "with --once")
    last: Overview | None = None
    with open_reporter(args.output, lambda: report.TopView()) as out:
        if args.once:
            out.final(await in_thread(overview))
            return 0
        try:
            while True:
                last = await in_thread(overview)
                out.event(last)
                await asyncio.sleep(max(args.interval, 0.1))
        finally:
            if last is not None and args.output == "human":
                out.final(last)
