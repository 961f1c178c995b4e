"""Arguments of `pageferry checkpoint`."""

from __future__ import annotations

import argparse

from pageferry.checkpoints.options import Options
from pageferry.cli.options import add_options

WORKS_ON = "name"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Save a running workload to an image file or to an object store. The workload is paused for milliseconds to "
        "save its state. Its memory as of this pause, the snapshot point, is written while the workload keeps running. "
        "IMAGE exists only when it is complete. Of a clone, only the private pages are stored; the parent of IMAGE is "
        "the image that the clone shares."
    )
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="workload to save (see `pageferry list`), or a process as pid:N"
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        help="file to write, which replaces an existing file; or URL of a new image in a store, such as "
        "s3://BUCKET/PREFIX/NAME (see docs/stores.md)",
    )
    parser.add_argument(
        "--parent",
        metavar="IMAGE",
        help="earlier image of the workload, a file or a URL: store only pages that differ; a restore then needs both "
        "images (default for a clone: the image that it shares, otherwise none)",
    )
    parser.add_argument(
        "--regions",
        metavar="LIST",
        help="memory of pid:N to save while the process is stopped: heap, stack, anon or START-END, separated by "
        "commas; such an image can be inspected but not restored",
    )
    _add_cloud_hypervisor(parser)
    add_options(parser, Options)


def _add_cloud_hypervisor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cloud-hypervisor",
        metavar="API_SOCKET",
        help="save the VM of Cloud Hypervisor with this API socket, instead of NAME; see docs/cloud-hypervisor.md",
    )
    parser.add_argument(
        "--preserve-source",
        action="store_true",
        help="save the VM of Cloud Hypervisor while it runs, and keep it; otherwise Cloud Hypervisor ends it "
        "when the image is complete",
    )
