"""Arguments of `pageferry logs`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.control.options import LogOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Print the output of a detached QEMU. The log of a guest that has ended is kept until a workload of its name "
        "starts. `pageferry list --all` lists these guests; the logs of the last 16 are kept, the last 1 MiB of each."
    )
    parser.add_argument("name", metavar="NAME", help="guest, running or ended")
    add_options(parser, LogOptions)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--follow", action="store_true", help="print further output until the guest ends")
    choice.add_argument("--remove", action="store_true", help="remove the log and the record of a guest that has ended")
