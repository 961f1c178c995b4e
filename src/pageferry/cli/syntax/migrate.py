"""Arguments of `pageferry migrate`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.migration.options import Options

WORKS_ON = "name"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Migrate a running workload to `pageferry receive` on another host. Memory is copied in rounds; each round "
        "sends the pages that were modified during the previous one. When few pages remain, the workload is paused, "
        "these pages and its state are sent, and it resumes at the destination. Any failure before that leaves it "
        "running at the source. With --mode postcopy or hybrid, it resumes before all of its memory has been sent, and "
        "fetches the remaining pages on demand. If the connection is lost in that phase, it waits for --recover."
    )
    parser.add_argument("name", metavar="NAME", help="workload to migrate (see `pageferry list`)")
    parser.add_argument("address", metavar="ADDRESS", nargs="?", help="address of the receiver: unix:PATH or HOST:PORT")
    add_options(parser, Options)
    parser.add_argument(
        "--switch",
        action="store_true",
        help="switch the running migration of NAME, started with --mode hybrid, to post-copy now",
    )
    _add_recovery(parser)


def _add_recovery(parser: argparse.ArgumentParser) -> None:
    after = parser.add_argument_group("recovery").add_mutually_exclusive_group()
    after.add_argument(
        "--recover",
        action="store_true",
        help="query the receiver for the owner of the workload, and complete or undo the migration; in post-copy, "
        "send the remaining pages",
    )
    after.add_argument(
        "--take-back",
        action="store_true",
        help="resume the workload on this host; use this only if the receiver does not run it and never will",
    )
