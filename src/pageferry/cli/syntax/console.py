"""Arguments of `pageferry console`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Connect the terminal to the serial console of a QEMU guest. Ctrl-] detaches; all other keys, such as Ctrl-C, "
        "are sent to the guest. Without a terminal, standard input is sent unchanged, and the command prints the "
        "output until the guest ends. pageferry connects the first serial port of guests that are started with "
        "--detach and without -serial, -nographic and -nodefaults; output is discarded while no console is attached. "
        "A pseudo-terminal or a socket on which QEMU listens can be opened as well."
    )
    parser.add_argument("name", metavar="NAME", help="guest (see `pageferry list`)")
    parser.add_argument(
        "--chardev",
        metavar="ID",
        help="id of another character device of QEMU (default: that of the first serial port)",
    )
