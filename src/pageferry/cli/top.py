"""`pageferry top`: the workloads of this host, again and again."""

from __future__ import annotations

import argparse
import asyncio

from pageferry.cli.arguments import seconds
from pageferry.host.blocking import in_thread
from pageferry.report.reporter import open_reporter
from pageferry.report.top import TopView
from pageferry.workloads.overview import Overview, overview


def configure(parser: argparse.ArgumentParser) -> None:
    """How often, or once."""
    parser.description = (
        "Shows the workloads of this host and what is done with them: memory that their processes map and how much of "
        "it on large pages, contents still to come from an image, and verbs at work with how far they are. Nothing is "
        "traced for it and nobody is disturbed: how fast memory is modified is shown while a migration finds out."
    )
    parser.add_argument(
        "--interval", type=seconds, default=2.0, metavar="TIME", help="between two looks, at least 100ms (2s)"
    )
    parser.add_argument("--once", action="store_true", help="look once and end")


async def run(args: argparse.Namespace) -> int:
    """Look until interrupted, or once."""
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
