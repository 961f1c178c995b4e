"""Arguments of `pageferry image`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pageferry.cli.parser import shared_options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the operations and their arguments."""
    operations = parser.add_subparsers(title="operations", dest="what", required=True, metavar="OPERATION")
    works = {
        "info": "print the metadata of an image, and its number of pages by class",
        "verify": "read and check every byte of an image and its parents; exit code 31 on damage",
        "diff": "compare two images; exit code 0 if they are identical, 1 if they differ",
        "flatten": "merge an incremental image and its parents into one image",
    }
    for name, text in works.items():
        below = operations.add_parser(name, help=text, description=f"{text.capitalize()}.", parents=[shared_options()])
        below.set_defaults(usage_error=below.error)
        below.add_argument("image", metavar="IMAGE", type=Path, help="image file written by `pageferry checkpoint`")
    operations.choices["diff"].add_argument("other", metavar="OTHER", type=Path, help="image to compare with")
    operations.choices["flatten"].add_argument("target", metavar="TARGET", type=Path, help="file to write")
    operations.choices["flatten"].add_argument(
        "--codec", choices=("none", "lz4", "zstd"), help="compression of the new image (default: that of IMAGE)"
    )
