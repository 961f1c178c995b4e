"""Arguments of `pageferry adopt`."""

from __future__ import annotations

import argparse

from pageferry.cli.options import add_options
from pageferry.control.options import AdoptOptions


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Register a QEMU guest that was not started by pageferry. Its memory must be in shared files: "
        "-object memory-backend-file,id=ram0,size=SIZE,share=on,align=2M,mem-path=FILE -machine memory-backend=ram0. "
        "With --libvirt, the guest is a domain of libvirt, whose XML adds a QMP socket (see the guide)."
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="name of the guest on this host (default: the name of the domain)"
    )
    add_options(parser, AdoptOptions)
