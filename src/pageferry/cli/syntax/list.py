"""Arguments of `pageferry list`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "List the workloads of this host: guests started by `pageferry run`, `receive`, `restore` or `clone`, "
        "adopted guests, and named arenas of Python programs. With --output json, print one object of type `workload` "
        "per line."
    )
    parser.add_argument(
        "--bases",
        action="store_true",
        help="list the copies of memory that clones share, instead of workloads (JSON type `base`)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="also list workloads that have ended, whose logs `pageferry logs` prints (JSON type `ended-workload`)",
    )
