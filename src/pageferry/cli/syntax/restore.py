"""Arguments of `pageferry restore`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from pageferry.checkpoints.options import Disks
from pageferry.cli.options import add_options
from pageferry.cli.syntax.guests import GuestOptions

TAKES_COMMAND = True
WORKS_ON = "name"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions(GuestOptions):
    """Options of the verb."""

    eager: bool = False
    """Load in the background without yielding to page faults."""
    no_prefetch: bool = False
    """Load pages only on demand."""
    disks: Disks = "checked"
    """Require disks that are known to be unchanged since the checkpoint (docs/disks.md), or accept them as they are."""
    paused: bool = False
    """Leave the guest paused, even if it ran when it was saved."""
    resume: bool = False
    """Run the guest, even if it was paused when it was saved."""
    takeover: bool = False
    """Start another pager for a guest whose pager has exited; give IMAGE if the image has been moved."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb; the command line of QEMU follows `--`."""
    parser.description = (
        "Start a QEMU guest that continues from the snapshot point of an image. It runs immediately; its memory is "
        "loaded on demand and in the background. A guest that was paused when it was saved stays paused, unless "
        "--resume is given. Without --detach, the guest stays attached to the terminal, and "
        "Ctrl-C terminates it. The image is opened read-only, and must stay in place until `pageferry list` shows no "
        "deferred memory."
    )
    parser.add_argument("name", metavar="NAME", help="name of the guest on this host")
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="image file written by `pageferry checkpoint`")
    add_options(parser, RestoreOptions)
    parser.usage = "pageferry restore NAME IMAGE [options] -- QEMU ARGS..."
