"""Arguments of `pageferry fleet`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.cli.parser import shared_options
from pageferry.fleet.options import ClusterOptions, JoinOptions, MoveOptions

_OPERATIONS = {
    "join": "run the agent of this host, which makes its workloads part of the fleet",
    "status": "list hosts, workloads, images and running operations",
    "move": "move a workload to a host",
}
OPTIONS: dict[str, type] = {
    "join": JoinOptions,
    "status": ClusterOptions,
    "move": MoveOptions,
}
"""Options of each operation."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the operations and their arguments."""
    operations = parser.add_subparsers(title="operations", dest="what", required=True, metavar="OPERATION")
    for name, text in _OPERATIONS.items():
        below = operations.add_parser(name, help=text, description=f"{text.capitalize()}.", parents=[shared_options()])
        below.set_defaults(usage_error=below.error)
        if name == "move":
            below.add_argument("workload", metavar="WORKLOAD", help="name of the workload")
            below.add_argument("host", metavar="HOST", help="host that receives it")
        add_options(below, OPTIONS[name])
