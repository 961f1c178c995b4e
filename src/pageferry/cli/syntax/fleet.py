"""Arguments of `pageferry fleet`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.cli.parser import shared_options
from pageferry.fleet.options import (
    CheckpointOptions,
    CloneOptions,
    ClusterOptions,
    EvacuateOptions,
    JoinOptions,
    MoveOptions,
    RebalanceOptions,
    RunOptions,
)

TAKES_COMMAND = True

_OPERATIONS = {
    "join": "run the agent of this host, which makes its workloads part of the fleet",
    "status": "list the hosts, workloads, images and running operations",
    "run": "start a QEMU guest on a host of the fleet",
    "clone": "start clones of an image on the hosts that have it",
    "move": "move a workload to a host",
    "evacuate": "move all workloads away from hosts",
    "rebalance": "level the memory use of the hosts with few moves",
    "checkpoint": "save workloads while they run",
    "cancel": "cancel running moves, checkpoints and starts",
}
OPTIONS: dict[str, type] = {
    "join": JoinOptions,
    "status": ClusterOptions,
    "run": RunOptions,
    "clone": CloneOptions,
    "move": MoveOptions,
    "evacuate": EvacuateOptions,
    "rebalance": RebalanceOptions,
    "checkpoint": CheckpointOptions,
    "cancel": ClusterOptions,
}
"""Options of each operation."""
COMMANDS = ("run", "clone")
"""Operations that take the command line of QEMU after `--`."""
_USAGE = {
    "run": "pageferry fleet run WORKLOAD [options] -- QEMU ARGS...",
    "clone": "pageferry fleet clone IMAGE --count N [--spread|--pack] [options] -- QEMU ARGS...",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the operations and their arguments."""
    parser.description = (
        "Place, move, clone and save the workloads of many hosts, which are nodes of a Ray cluster (package "
        "pageferry[ray]). Each host runs `pageferry fleet join`. Plans are printed before they are carried out. Memory "
        "is sent from host to host, as by `pageferry migrate`. See docs/fleet.md."
    )
    operations = parser.add_subparsers(title="operations", dest="what", required=True, metavar="OPERATION")
    for name, text in _OPERATIONS.items():
        below = operations.add_parser(name, help=text, description=f"{text.capitalize()}.", parents=[shared_options()])
        below.set_defaults(usage_error=below.error)
        add_options(below, OPTIONS[name], without=("policy",))
        if name in _USAGE:
            below.usage = _USAGE[name]
    add = {name: operations.choices[name].add_argument for name in _OPERATIONS}
    for name in ("run", "move"):
        add[name]("workload", metavar="WORKLOAD", help="name of the workload, unique in the fleet")
    add["move"]("host", metavar="HOST", help="host that receives the workload")
    add["clone"](
        "image", metavar="IMAGE", help="path or file name of an image on the hosts, or URL of an image in a store"
    )
    add["evacuate"]("words", metavar="HOST", nargs="+", help="name of a host, or label KEY=VALUE of hosts")
    add["checkpoint"]("target", metavar="TARGET", help="URL in a store, or directory on the hosts, for the images")
    add["checkpoint"]("words", metavar="WORKLOAD", nargs="*", help="workload to save")
    add["checkpoint"]("--all", action="store_true", help="save all workloads of the fleet")
    add["cancel"]("words", metavar="WORKLOAD", nargs="*", help="workload whose operations are cancelled (default: all)")
    _add_policy(operations.choices["clone"])


def _add_policy(parser: argparse.ArgumentParser) -> None:
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument(
        "--spread", dest="policy", action="store_const", const="spread", help="use the emptiest hosts (default)"
    )
    policy.add_argument(
        "--pack", dest="policy", action="store_const", const="pack", help="use as few hosts as possible"
    )
    parser.set_defaults(policy="spread")
