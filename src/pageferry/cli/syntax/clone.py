"""Arguments of `pageferry clone`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Annotated

from pageferry.checkpoints.options import RESTORED_DISKS, Clones, Memory
from pageferry.cli.options import add_options
from pageferry.options import Choice
from pageferry.stores.options import OpenOptions
from pageferry.values import Placed

TAKES_COMMAND = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CloneOptions:
    """Options of the verb."""

    count: Clones = 1
    """Number of guests to start."""
    name: str = "clone-{n}"
    """Name of each guest; {n} stands for its number, from 1 on."""
    memory: Memory = "shared"
    """Share one copy of the memory in the image (shared), or load separate memory for each guest (own); pages that a
    guest writes to are private."""
    detach: bool = False
    """Return when all guests run."""
    eager: bool = False
    """Load in the background without yielding to page faults."""
    no_prefetch: bool = False
    """Load pages only on demand."""
    disks: Annotated[Placed | None, RESTORED_DISKS] = None
    """Require disks that are known to be unchanged since the checkpoint (checked), accept them as they are (as-is), or
    put a new overlay on each disk that was saved with the image (overlay or overlay:DIR); see docs/disks.md."""
    clock: Annotated[str | None, Choice(("host", "image"), unset="as QEMU's -rtc specifies")] = None
    """Continue the real-time clocks of the guests from the time of the host (host) or of the image (image)."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb; the command line of QEMU follows `--`."""
    parser.description = (
        "Start several QEMU guests from one image at the same time. The guests share one copy of the memory in the "
        "image; pages that a guest writes to are private. In the command line of QEMU, {n} and {name} stand for the "
        "number and the name of the guest. The output of each guest is in its log. Without --detach, the command waits "
        "until all guests have exited, and Ctrl-C terminates them."
    )
    parser.add_argument("image", metavar="IMAGE", help="image file, or URL of an image in a store")
    add_options(parser, CloneOptions)
    add_options(parser, OpenOptions)
    parser.usage = "pageferry clone IMAGE --count N [options] -- QEMU ARGS..."
