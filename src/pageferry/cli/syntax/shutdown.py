"""Arguments of `pageferry shutdown`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.control.options import ShutdownOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Press the power button of a QEMU guest (ACPI), and wait until the guest has shut down. If it does not, the "
        "command fails with exit code 14, and the guest keeps running; with --force, the guest is then stopped."
    )
    parser.add_argument("name", metavar="NAME", help="guest to shut down (see `pageferry list`)")
    add_options(parser, ShutdownOptions)
