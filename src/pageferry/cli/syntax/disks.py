"""Arguments of `pageferry disks`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.cli.parser import shared_options
from pageferry.control.options import CommitOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the operations and their arguments."""
    operations = parser.add_subparsers(title="operations", dest="what", required=True, metavar="OPERATION")
    commit = operations.add_parser(
        "commit",
        help="write overlays back to the disks that a checkpoint has frozen",
        description="Write the overlays of a running guest back to the disks that `pageferry checkpoint --disks "
        "snapshot` has frozen. The guest keeps running, and uses the disks of its command line afterwards. The "
        "overlays are removed. The command fails if an image or another overlay needs a frozen disk.",
        parents=[shared_options()],
    )
    commit.set_defaults(usage_error=commit.error)
    commit.add_argument("name", metavar="NAME", help="guest whose disks are written back (see `pageferry list`)")
    add_options(commit, CommitOptions)
