"""`pageferry image`: inspect, verify, compare or flatten images."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from pageferry import report
from pageferry.errors import ImageError, WorkloadError
from pageferry.events import Event
from pageferry.host.blocking import in_thread
from pageferry.images.events import (
    Difference,
    DiskSummary,
    Flattened,
    ImageSummary,
    LayerSummary,
    RegionSummary,
    Verification,
)
from pageferry.images.image import ImageFile
from pageferry.memory.regions import SMALL_PAGE
from pageferry.report.reporter import open_reporter
from pageferry.workloads.qemu import block_devices
from pageferry.workloads.qemu.block_devices import Layer
from pageferry.workloads.qemu.device_state import SavedState

CLASSES = {
    "absent": "absent",
    "zero": "zero",
    "pattern": "pattern",
    "same-as": "same_as",
    "data": "data",
    "parent": "in_parent",
}


async def run(args: argparse.Namespace) -> int:
    """Run the requested operation in a thread, so that Ctrl-C can cancel it, and print its result."""
    result, code = await in_thread(OPERATIONS[args.what], args)
    with open_reporter(args.output, lambda: report.ImageView()) as out:
        out.final(result)
    return code


def _info(args: argparse.Namespace) -> tuple[Event, int]:
    file = ImageFile(args.image)
    image, about = file.image, file.metadata
    regions, first = [], 0
    for region in about.regions:
        pages = region.length // SMALL_PAGE
        counted = image.count(first, pages)
        counts = {name: getattr(counted, field) for name, field in CLASSES.items()}
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
        disks=_disks(file),
    )
    return summary, 0


def _disks(file: ImageFile) -> list[DiskSummary] | None:
    try:
        record = block_devices.decode(file.metadata.details)
    except WorkloadError as wrong:
        raise ImageError(f"{file.path}: {wrong}") from wrong
    if record is None:
        return None
    return [
        DiskSummary(
            id=disk.id,
            name=disk.name,
            size=disk.layers[0].size if disk.layers else 0,
            read_only=disk.read_only,
            cache=disk.cache,
            in_state=disk.in_state,
            layers=[_layer(layer) for layer in disk.layers],
        )
        for disk in record.devices
    ]


def _layer(layer: Layer) -> LayerSummary:
    generation = layer.generation
    modified = block_devices.time_text(generation.modified) if generation is not None else None
    return LayerSummary(path=layer.path, format=layer.format, driver=layer.driver, modified=modified)


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
    raise ImageError(f"{file.path} is damaged: page {start} is outside all regions; take another checkpoint")


def _flatten(args: argparse.Namespace) -> tuple[Event, int]:
    try:
        ImageFile(args.image).flatten(args.target, args.codec)
    except OSError as error:
        raise ImageError(f"cannot write {args.target}: {error.strerror}") from error
    return Flattened(str(args.target), args.target.stat().st_size), 0


OPERATIONS: dict[str, Callable[[argparse.Namespace], tuple[Event, int]]] = {
    "info": _info,
    "verify": _verify,
    "diff": _diff,
    "flatten": _flatten,
}
