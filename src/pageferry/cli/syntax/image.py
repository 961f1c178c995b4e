"""Arguments of `pageferry image`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from pageferry.checkpoints.options import Options
from pageferry.cli.options import add_options
from pageferry.cli.parser import shared_options
from pageferry.images.metadata import Codec
from pageferry.stores.options import CollectOptions, KeyOptions, OpenOptions, PushOptions

_FILE = "image file written by `pageferry checkpoint`"
_STORE = "URL of a store, such as s3://BUCKET/PREFIX (see docs/stores.md)"
_URL = "URL of an image in a store, such as s3://BUCKET/PREFIX/NAME (see docs/stores.md)"
_IMAGE = "image file, or URL of an image in a store"
_OPERATIONS = {
    "info": "print the metadata of an image, and its number of pages by class",
    "verify": "read and check every byte of an image and its parents; exit code 31 on damage",
    "diff": "compare two images; exit code 0 if they are identical, 1 if they differ",
    "flatten": "merge an incremental image and its parents into one image",
    "import": "write an image of a Firecracker snapshot: its memory file and its state file",
    "export": "write the memory file and the state file of a Firecracker snapshot from an image",
    "push": "upload an image and its parents to a store; contents that the store has are not uploaded",
    "pull": "download an image from a store, and its parents to the same directory",
    "copy": "copy an image and its parents from a store or to a store; contents that the target has are not copied",
    "list": "list the images of a store",
    "delete": "delete an image, and copies of disks that no other image and no overlay needs",
    "gc": "mark objects of a store that no image needs, and delete those that an earlier collection has marked",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the operations and their arguments."""
    operations = parser.add_subparsers(title="operations", dest="what", required=True, metavar="OPERATION")
    for name, text in _OPERATIONS.items():
        below = operations.add_parser(name, help=text, description=f"{text.capitalize()}.", parents=[shared_options()])
        below.set_defaults(usage_error=below.error)
    add = {name: operations.choices[name].add_argument for name in _OPERATIONS}
    for name in ("info", "verify", "diff", "flatten", "push"):
        add[name]("image", metavar="IMAGE", help=_FILE if name == "push" else _IMAGE)
    add["diff"]("other", metavar="OTHER", help="image to compare with")
    add["copy"]("image", metavar="IMAGE", help=_IMAGE)
    add["copy"]("target", metavar="TARGET", help=f"file to write, or {_URL}; one of both is in a store")
    add["flatten"]("target", metavar="TARGET", help=f"file to write, or {_URL}")
    add["flatten"](
        "--codec", choices=("none", "lz4", "zstd"), help="compression of the new image (default: that of IMAGE)"
    )
    add["push"]("url", metavar="URL", help=f"{_URL}; the name is that of the file if the URL ends with a slash")
    add_options(operations.choices["push"], PushOptions)
    add["pull"]("url", metavar="URL", help=_URL)
    for name in ("info", "verify", "diff", "flatten", "export", "pull", "copy"):
        add_options(operations.choices[name], OpenOptions)
    add_options(operations.choices["list"], KeyOptions)
    add["import"]("image", metavar="IMAGE", type=Path, help="image file to write")
    add["export"]("image", metavar="IMAGE", help=f"{_IMAGE}, of a snapshot of Firecracker")
    add["pull"]("image", metavar="IMAGE", type=Path, help="file to write")
    add["list"]("url", metavar="URL", help=_STORE)
    add["delete"]("image", metavar="IMAGE", help=f"image file, or {_URL}")
    add["gc"]("url", metavar="URL", help=_STORE)
    add_options(operations.choices["gc"], CollectOptions)
    _add_import(operations.choices["import"])
    _add_snapshot_files(operations.choices["export"], "write")


def _add_import(parser: argparse.ArgumentParser) -> None:
    _add_snapshot_files(parser, "read")
    parser.add_argument(
        "--parent",
        metavar="IMAGE",
        type=Path,
        help="image of the snapshot that this one is based on: store only pages that differ from it; holes of MEMFILE "
        "are its pages, as in a diff snapshot",
    )
    parser.add_argument(
        "--full", action="store_true", help="with --parent: the snapshot is a full one, and holes of MEMFILE are zeros"
    )
    parser.add_argument(
        "--codec", choices=get_args(Codec), default=Options().codec, help="compression (default: %(default)s)"
    )


def _add_snapshot_files(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument(
        "--firecracker", metavar="MEMFILE", type=Path, required=True, help=f"memory file of the snapshot to {verb}"
    )
    parser.add_argument(
        "--vmstate", metavar="FILE", type=Path, required=True, help=f"state file of the snapshot to {verb}"
    )
