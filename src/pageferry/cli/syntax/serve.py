"""Arguments of `pageferry serve`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pageferry.cli.options import add_options
from pageferry.options import Count
from pageferry.pager.firecracker.options import MAX_MICROVMS, OnFailure
from pageferry.stores.options import OpenOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Options of the verb."""

    detach: bool = False
    """Return when the socket accepts connections; serve in a separate process, which ends on SIGTERM."""
    microvms: Annotated[int, Count(0, MAX_MICROVMS, metavar="N")] = 1
    """Number of microVMs to serve; 0 for any number, until the pager is stopped."""
    eager: bool = False
    """Load in the background without yielding to page faults."""
    no_prefetch: bool = False
    """Load pages only on demand."""
    on_failure: OnFailure = "kill"
    """Kill Firecracker (kill) or stop it by SIGSTOP (freeze) if the memory of its microVM cannot be loaded."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Load the memory of microVMs from an image, on demand and in the background, as the page fault handler of "
        "Firecracker. Start it before `PUT /snapshot/load`; see docs/firecracker.md for the requests. The image is "
        "one written by `pageferry image import`. Without --detach, Ctrl-C kills or stops the microVMs whose memory is "
        "not loaded completely, depending on --on-failure."
    )
    parser.add_argument("image", metavar="IMAGE", help="image written by `pageferry image import`, a file or a URL")
    parser.add_argument(
        "--firecracker",
        metavar="SOCKET",
        type=Path,
        required=True,
        help="Unix socket to create, the `backend_path` of `PUT /snapshot/load`",
    )
    add_options(parser, ServeOptions)
    add_options(parser, OpenOptions)
