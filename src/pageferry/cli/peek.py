"""`pageferry peek`: look at the memory of a workload, also of one whose contents are still to come."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import msgspec

from pageferry.cli.arguments import size
from pageferry.errors import UsageError
from pageferry.events import Event
from pageferry.host.registry import Registry
from pageferry.printable import printable_json
from pageferry.workloads import deferred
from pageferry.workloads.base import SMALL_PAGE, Region
from pageferry.workloads.opening import open_workload

MAX_LENGTH = 64 << 20


class Peeked(Event, frozen=True, kw_only=True, tag="memory"):
    """Bytes of a workload's memory."""

    workload: str
    region: str
    offset: int
    length: int
    data: str
    """Hexadecimal."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.description = (
        "Prints memory of a running workload, by offset in its memory (as `pageferry list` counts it). Pages whose "
        "contents are still to come from an image are read first, and only those."
    )
    parser.add_argument("name", metavar="NAME", help="workload to look at")
    parser.add_argument("offset", metavar="OFFSET", type=_number, help="bytes from the start of the region; 0x... too")
    parser.add_argument("length", metavar="LENGTH", type=size, help="how many bytes")
    parser.add_argument("--region", metavar="REGION", help="which region (default: the first)")
    parser.add_argument("--raw", action="store_true", help="write the bytes as they are")


async def run(args: argparse.Namespace) -> int:
    """Look."""
    if args.raw and sys.stdout.isatty():
        raise UsageError("raw memory is not written to a terminal: redirect the output, or leave out --raw")
    workload = await open_workload(args.name)
    try:
        number, region = _region(workload.regions, args.region)
        if not 0 <= args.offset < args.offset + args.length <= region.length or args.length > MAX_LENGTH:
            raise UsageError(f"{args.length} bytes at {args.offset} of {region.name}, which has {region.length}")
        first, end = args.offset // SMALL_PAGE, -(-(args.offset + args.length) // SMALL_PAGE)
        deferred.ensure(Registry().folder(args.name), number, first, end - first)
        data = os.pread(region.fd, args.length, region.file_offset + args.offset)
    finally:
        workload.close()
    if args.raw:
        sys.stdout.buffer.write(data)
    elif args.output == "json":
        found = Peeked(workload=args.name, region=region.name, offset=args.offset, length=args.length, data=data.hex())
        sys.stdout.write(printable_json(msgspec.json.encode(found)).decode() + "\n")
    else:
        sys.stdout.writelines(_lines(args.offset, data))
    return 0


def _region(regions: tuple[Region, ...], name: str | None) -> tuple[int, Region]:
    for number, region in enumerate(regions):
        if name in (None, region.name):
            return number, region
    raise UsageError(f"there is no region {name}: there are {', '.join(region.name for region in regions)}")


def _lines(offset: int, data: bytes) -> Iterator[str]:
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{offset + start:012x}  {row.hex(' ', 1):<47}  {text}\n"


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return size(text)
