"""Arguments of `pageferry top`."""

from __future__ import annotations

import argparse

from pageferry.cli.arguments import seconds


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Show the workloads of this host: the memory that their processes map, the fraction of it on huge pages, the "
        "deferred memory, and the running operations with their progress. The command neither traces memory nor "
        "interrupts a workload; it shows the dirty rate while a migration measures it."
    )
    parser.add_argument(
        "--interval",
        type=seconds,
        default="2s",
        metavar="DURATION",
        help="time between refreshes, at least 100ms (default: %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="print the state once and exit")
