"""Arguments of `pageferry pause`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Pause QEMU guests until `pageferry resume`. A paused guest can be checkpointed and migrated, and stays "
        "paused. If another operation has paused a guest, the command waits until that operation has ended."
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="guests to pause (see `pageferry list`)")
