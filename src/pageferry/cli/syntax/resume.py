"""Arguments of `pageferry resume`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Resume QEMU guests that were paused by `pageferry pause`, by QMP, by -S or by a disk error. A guest that may "
        "run on another host is not resumed; `pageferry migrate --recover` finds out which host owns it."
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help="guests to resume (see `pageferry list`)")
