"""Arguments of `pageferry peek`."""

from __future__ import annotations

import argparse

from pageferry.cli.arguments import size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.description = (
        "Print memory of a running workload, addressed by the offset in a region. Deferred pages of the range are "
        "loaded first; those of a clone are read from its image."
    )
    parser.add_argument("name", metavar="NAME", help="workload to read (see `pageferry list`)")
    parser.add_argument(
        "offset",
        metavar="OFFSET",
        type=_number,
        help="bytes from the start of the region, decimal or 0x..., or a size such as 1M",
    )
    parser.add_argument("length", metavar="LENGTH", type=size, help="number of bytes, such as 64 or 4K")
    parser.add_argument("--region", metavar="REGION", help="name of the region (default: the first one)")
    parser.add_argument("--raw", action="store_true", help="write the bytes unformatted")


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return size(text)
