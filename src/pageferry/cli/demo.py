"""`pageferry demo`: migrate the built-in workload between two processes of this host."""

from __future__ import annotations

import argparse
import os

from pageferry.cli.arguments import fraction, integer, rate, seconds, size
from pageferry.cli.migrate import add_options, options_of
from pageferry.demo.ledger import LedgerOptions
from pageferry.demo.process import Setup
from pageferry.demo.run import demonstrate
from pageferry.report.migration import DemoView
from pageferry.report.reporter import open_reporter


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Start a workload that writes to memory continuously and records every write. Migrate it to another process "
        "while it writes, let it run there, and compare every page with the records. Takes a few seconds."
    )
    load = parser.add_argument_group("workload")
    load.add_argument("--size", type=size, default="512M", help="size of its memory (default: %(default)s)")
    load.add_argument("--rate", type=rate, default="20M", help="bytes written per second (default: %(default)s)")
    load.add_argument(
        "--working-set",
        type=fraction,
        default=0.3,
        metavar="FRACTION",
        help="fraction of the memory that is written to (default: %(default)s)",
    )
    load.add_argument(
        "--zeros",
        type=fraction,
        default=0.2,
        metavar="FRACTION",
        help="fraction of the writes that fill a page with zeros (default: %(default)s)",
    )
    load.add_argument("--threads", type=integer, default=2, metavar="N", help="writer threads (default: %(default)s)")
    load.add_argument(
        "--processes",
        type=integer,
        default=1,
        metavar="N",
        help="processes that the threads are distributed over (default: %(default)s)",
    )
    load.add_argument(
        "--seconds",
        type=seconds,
        default="1s",
        metavar="DURATION",
        help="time to write before and after the migration; a plain number is in seconds (default: %(default)s)",
    )
    add_options(parser)


async def run(args: argparse.Namespace) -> int:
    """Migrate the workload once and verify its memory."""
    with open_reporter(args.output, DemoView()) as out:
        setup = _setup(args, f"demo-{os.getpid()}")
        result = await demonstrate(setup, args.seconds, out.event, options_of(args))
        out.final(result)
    return 0 if result.intact else 1


def _setup(args: argparse.Namespace, name: str) -> Setup:
    options = LedgerOptions(
        threads=args.threads,
        rate=args.rate,
        working_set=args.working_set,
        zero_fraction=args.zeros,
        seed=os.getpid(),
    )
    return Setup(name=name, size=args.size, options=options, processes=args.processes)
