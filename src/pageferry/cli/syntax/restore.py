"""Arguments of `pageferry restore`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated

from pageferry.checkpoints.options import RESTORED_DISKS, Memory
from pageferry.cli.options import add_options
from pageferry.cli.syntax.guests import GuestOptions
from pageferry.options import Choice, Text
from pageferry.stores.options import OpenOptions
from pageferry.values import Placed

TAKES_COMMAND = True
WORKS_ON = "name"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreOptions(GuestOptions):
    """Options of the verb."""

    eager: bool = False
    """Load in the background without yielding to page faults."""
    no_prefetch: bool = False
    """Load pages only on demand."""
    memory: Memory = "own"
    """Load separate memory for the guest (own), or share one copy of the memory in the image with other guests
    (shared); pages that the guest writes to are private."""
    disks: Annotated[Placed | None, RESTORED_DISKS] = None
    """Require disks that are known to be unchanged since the checkpoint (checked), accept them as they are (as-is), or
    put a new overlay on each disk that was saved with the image (overlay or overlay:DIR); see docs/disks.md."""
    paused: bool = False
    """Leave the guest paused, even if it was running when it was saved."""
    resume: bool = False
    """Run the guest, even if it was paused when it was saved."""
    guid: Annotated[str, Text(metavar="new|image|GUID")] = "new"
    """Generation ID of a guest with the device vmgenid: a random one, that of the image, or this GUID."""
    clock: Annotated[str | None, Choice(("host", "image"), unset="as QEMU's -rtc specifies")] = None
    """Continue the real-time clock of the guest from the time of the host (host) or of the image (image)."""
    takeover: bool = False
    """Start another pager for a guest whose pager has exited, or for a Python program that has lost the pager of its
    shared memory; give IMAGE if the image has been moved."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb; the command line of QEMU follows `--`."""
    parser.description = (
        "Start a QEMU guest that continues from the snapshot point of an image. The guest runs at once; its memory is "
        "loaded on demand and in the background. A guest that was paused when it was saved stays paused, unless "
        "--resume is given. `{name}` in the command line of QEMU stands for NAME. "
        "Without --detach, the guest stays attached to the terminal, and Ctrl-C terminates it. The image is opened "
        "read-only, and must stay in place until `pageferry list` shows no deferred memory."
    )
    parser.add_argument("name", metavar="NAME", help="name of the guest on this host")
    parser.add_argument(
        "image",
        metavar="IMAGE",
        nargs="?",
        help="image file, or URL of an image in a store",
    )
    add_options(parser, RestoreOptions)
    add_options(parser, OpenOptions)
    parser.usage = "pageferry restore NAME IMAGE [options] -- QEMU ARGS..."
