"""`pageferry image`: what is in an image, whether it is right, how two differ, and one out of a chain."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from pageferry.checkpoints.image import ImageFile
from pageferry.cli.parser import shared_options
from pageferry.errors import ImageError
from pageferry.events import Event
from pageferry.host.blocking import in_thread
from pageferry.report.image import ImageView
from pageferry.report.reporter import open_reporter
from pageferry.workloads.base import SMALL_PAGE
from pageferry.workloads.qemu_state import SavedState

CLASSES = ("absent", "zero", "pattern", "same-as", "data", "parent")


class RegionSummary(msgspec.Struct, frozen=True, rename="kebab"):
    """A region and its pages by class."""

    name: str
    length: int
    pages: dict[str, int]


class ImageSummary(Event, frozen=True, kw_only=True, tag="image"):
    """What `image info` says of an image."""

    path: str
    id: str
    digest: str
    kind: str
    name: str
    restorable: bool
    paused: bool
    """Whether a guest had been paused by its user when it was saved: one that is restored is paused."""
    created: str
    """UTC, ISO 8601."""
    codec: str
    length: int
    """Bytes of the file."""
    blocks: int
    page_block: int
    state: int
    """Bytes."""
    regions: list[RegionSummary]
    parents: list[str]


class Verification(Event, frozen=True, tag="image-verify"):
    """What `image verify` says."""

    path: str
    intact: bool
    findings: list[str]


class Difference(Event, frozen=True, tag="image-diff"):
    """What `image diff` says."""

    same: bool
    pages: int
    """Pages that differ."""
    runs: list[tuple[str, int, int]]
    """(region, first byte, bytes) of each run of pages that differ."""
    state_differs: bool


class Flattened(Event, frozen=True, tag="image-flatten"):
    """What `image flatten` says."""

    path: str
    length: int


def configure(parser: argparse.ArgumentParser) -> None:
    """What to do with which images."""
    what = parser.add_subparsers(title="what", dest="what", required=True, metavar="WHAT")
    works = {
        "info": (_info, "say what is in an image"),
        "verify": (_verify, "read every byte of an image and its parents; exit 31 if one is wrong"),
        "diff": (_diff, "compare two images: exit 0 the same, 1 different"),
        "flatten": (_flatten, "write one image out of an incremental one and its parents"),
    }
    for name, (work, text) in works.items():
        below = what.add_parser(name, help=text, description=f"{text.capitalize()}.", parents=[shared_options()])
        below.set_defaults(work=work, complain=below.error)
        below.add_argument("image", metavar="IMAGE", type=Path, help="as `pageferry checkpoint` writes it")
    what.choices["diff"].add_argument("other", metavar="OTHER", type=Path, help="another one")
    what.choices["flatten"].add_argument("target", metavar="TARGET", type=Path, help="file to write")
    what.choices["flatten"].add_argument(
        "--codec", choices=("none", "lz4", "zstd"), help="of the new image (as in the old one)"
    )


async def run(args: argparse.Namespace) -> int:
    """Do it, off the event loop: Ctrl-C ends it between two slices."""
    work: Callable[[argparse.Namespace], tuple[Event, int]] = args.work
    result, code = await in_thread(work, args)
    with open_reporter(args.output, ImageView()) as out:
        out.final(result)
    return code


def _info(args: argparse.Namespace) -> tuple[Event, int]:
    file = ImageFile(args.image)
    image, about = file.image, file.metadata
    regions, first = [], 0
    for region in about.regions:
        pages = region.length // SMALL_PAGE
        counts = dict(zip(CLASSES, image.count(first, pages), strict=True))
        regions.append(RegionSummary(region.name, region.length, counts))
        first += pages
    summary = ImageSummary(
        path=str(file.path),
        id=image.id.hex(),
        digest=f"{image.digest:016x}",
        kind=about.kind,
        name=about.name,
        restorable=about.restorable,
        paused=about.kind == "qemu" and not SavedState.decode(file.state()).was_running,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(about.created)),
        codec=about.codec,
        length=image.length,
        blocks=len(image.blocks),
        page_block=image.page_block,
        state=len(file.state()),
        regions=regions,
        parents=[str(link.path) for link in file.links[1:]],
    )
    return summary, 0


def _verify(args: argparse.Namespace) -> tuple[Event, int]:
    findings = ImageFile(args.image).verify()
    return Verification(str(args.image), not findings, findings), ImageError.exit_code if findings else 0


def _diff(args: argparse.Namespace) -> tuple[Event, int]:
    one, other = ImageFile(args.image), ImageFile(args.other)
    runs = one.differences(other)
    state_differs = one.state() != other.state()
    same = not runs and not state_differs
    named = [_named(one, start, end) for start, end in runs]
    return Difference(same, sum(end - start for start, end in runs), named, state_differs), 0 if same else 1


def _named(file: ImageFile, start: int, end: int) -> tuple[str, int, int]:
    first = 0
    for region in file.metadata.regions:
        pages = region.length // SMALL_PAGE
        if start < first + pages:
            return region.name, (start - first) * SMALL_PAGE, (end - start) * SMALL_PAGE
        first += pages
    raise ImageError(f"page {start} is in no region")


def _flatten(args: argparse.Namespace) -> tuple[Event, int]:
    try:
        ImageFile(args.image).flatten(args.target, args.codec)
    except OSError as error:
        raise ImageError(f"{args.target} cannot be written: {error.strerror}") from error
    return Flattened(str(args.target), args.target.stat().st_size), 0
