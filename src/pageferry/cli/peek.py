"""`pageferry peek`: print memory of a workload, loading it first if its contents are deferred."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import msgspec

from pageferry.errors import UsageError
from pageferry.host.registry import Registry
from pageferry.memory.events import Peeked
from pageferry.memory.regions import SMALL_PAGE
from pageferry.memory.view import Extent
from pageferry.pager import client
from pageferry.printable import printable_json
from pageferry.workloads.open import open_workload
from pageferry.workloads.protocols import Migratable, clone_of

MAX_LENGTH = 64 << 20
"""Maximum number of bytes to print."""


async def run(args: argparse.Namespace) -> int:
    """Load the requested range if its contents are deferred, and print it."""
    if args.raw and sys.stdout.isatty():
        raise UsageError("cannot write raw memory to a terminal: redirect stdout, or remove --raw")
    workload = await open_workload(args.name)
    try:
        region, data = _read(args, workload)
    finally:
        workload.close()
    if args.raw:
        sys.stdout.buffer.write(data)
    elif args.output == "json":
        found = Peeked(workload=args.name, region=region, offset=args.offset, length=args.length, data=data.hex())
        sys.stdout.write(printable_json(msgspec.json.encode(found)).decode() + "\n")
    else:
        sys.stdout.writelines(_lines(args.offset, data))
    return 0


def _read(args: argparse.Namespace, workload: Migratable) -> tuple[str, bytes]:
    """Return the name of the region, and the requested bytes."""
    clone = clone_of(workload)
    number, region = _region(workload.regions if clone is None else clone.regions, args.region)
    if not 0 <= args.offset < args.offset + args.length <= region.length or args.length > MAX_LENGTH:
        raise UsageError(_range_error(args, region))
    first, end = args.offset // SMALL_PAGE, -(-(args.offset + args.length) // SMALL_PAGE)
    if clone is not None:
        from pageferry.workloads.clone_view import PrivateMemory

        pages = PrivateMemory(workload.name, clone).read(number, first, end - first)
        start = args.offset - first * SMALL_PAGE
        return region.name, pages[start : start + args.length]
    client.ensure(Registry().folder(args.name), number, first, end - first)
    file = workload.regions[number]
    return region.name, os.pread(file.fd, args.length, file.file_offset + args.offset)


def _range_error(args: argparse.Namespace, region: Extent) -> str:
    return (
        f"invalid range of {args.length} bytes at {args.offset}: {region.name} has {region.length} bytes, of which at "
        f"most {MAX_LENGTH} can be printed at once"
    )


def _region(regions: Sequence[Extent], name: str | None) -> tuple[int, Extent]:
    for number, region in enumerate(regions):
        if name in (None, region.name):
            return number, region
    known = ", ".join(region.name for region in regions)
    raise UsageError(f"invalid region {name!r}: expected one of {known}")


def _lines(offset: int, data: bytes) -> Iterator[str]:
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{offset + start:012x}  {row.hex(' ', 1):<47}  {text}\n"
