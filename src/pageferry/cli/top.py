"""`pageferry top`: show workloads and running operations, refreshed periodically."""

from __future__ import annotations

import argparse
import asyncio

from pageferry.cli.arguments import seconds
from pageferry.host.blocking import in_thread
from pageferry.report.reporter import open_reporter
from pageferry.report.top import TopView
from pageferry.workloads.events import Overview
from pageferry.workloads.overview import overview


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Show the workloads of this host: the memory that their processes map, its share on huge pages, the deferred "
        "memory, and the running operations with their progress. No memory is traced for this and no workload is "
        "interrupted; the dirty rate is shown while a migration measures it."
    )
    parser.add_argument(
        "--interval",
        type=seconds,
        default="2s",
        metavar="DURATION",
        help="time between refreshes, at least 100ms (default: %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="print the state once and exit")


async def run(args: argparse.Namespace) -> int:
    """Show the workloads once, or until interrupted."""
    last: Overview | None = None
    with open_reporter(args.output, TopView()) as out:
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
