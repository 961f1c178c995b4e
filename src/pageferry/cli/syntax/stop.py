"""Arguments of `pageferry stop`."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Stop a workload: a QEMU guest with the monitor command `quit`, which acts like a power cut; the program of an "
        "arena with SIGTERM."
    )
    parser.add_argument("name", metavar="NAME", help="workload to stop (see `pageferry list`)")
    parser.add_argument("--kill", action="store_true", help="send SIGKILL, for a workload that does not respond")
