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
    """Kill the virtual machine monitor (kill) or stop it by SIGSTOP (freeze) if the memory of its VM cannot be
    loaded."""
    on_demand: bool = False
    """Resume the VM of Cloud Hypervisor before its memory is loaded, and load accessed pages first; requires
    `memory_mode` `Postcopy`."""
    paused: bool = False
    """Leave the VM of Cloud Hypervisor paused."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Load the memory of microVMs from an image, on demand and in the background, as the page fault handler of "
        "Firecracker. Start it before `PUT /snapshot/load`; see docs/firecracker.md for the requests. The image is "
        "one written by `pageferry image import`. Or restore a VM of Cloud Hypervisor, which waits for a migration "
        "(`PUT vm.receive-migration`); see docs/cloud-hypervisor.md. The image is one written by `pageferry checkpoint "
        "--cloud-hypervisor`. Without --detach, Ctrl-C kills or stops the VMs that need memory that is not loaded, "
        "depending on --on-failure."
    )
    parser.add_argument("image", metavar="IMAGE", help="image of a microVM or a VM, a file or a URL")
    monitor = parser.add_mutually_exclusive_group(required=True)
    monitor.add_argument(
        "--firecracker",
        metavar="SOCKET",
        type=Path,
        help="Unix socket to create, the `backend_path` of `PUT /snapshot/load`",
    )
    monitor.add_argument(
        "--cloud-hypervisor",
        metavar="SOCKET",
        type=Path,
        help="Unix socket on which Cloud Hypervisor waits, the `receiver_url` of `PUT vm.receive-migration`",
    )
    add_options(parser, ServeOptions)
    add_options(parser, OpenOptions)
