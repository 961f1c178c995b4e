"""Arguments of `pageferry run`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.cli.syntax.guests import GuestOptions

TAKES_COMMAND = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb; the command line of QEMU follows `--`."""
    parser.description = (
        "Start an unmodified QEMU under management: its memory is in a shared file with huge pages, and pageferry adds "
        "a QMP monitor. `{name}` in the command line of QEMU stands for NAME. "
        "Without --detach, the guest stays attached to the terminal, and Ctrl-C terminates it."
    )
    parser.add_argument("name", metavar="NAME", help="name of the guest on this host")
    add_options(parser, GuestOptions)
    parser.usage = "pageferry run NAME [options] -- QEMU ARGS..."
