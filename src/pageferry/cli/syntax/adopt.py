"""Arguments of `pageferry adopt`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Register a QEMU guest that was not started by pageferry. Its memory must be in shared files: "
        "-object memory-backend-file,id=ram0,size=SIZE,share=on,align=2M,mem-path=FILE -machine memory-backend=ram0."
    )
    parser.add_argument("name", metavar="NAME", help="name of the guest on this host")
    parser.add_argument(
        "--qmp",
        metavar="SOCKET",
        required=True,
        help="Unix socket of a QMP monitor that no other program uses (QEMU option -qmp unix:...)",
    )
