"""Inputs of every restore: the image, its record of huge pages, and the files that its contents are loaded into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pageferry._engine import Mapping, TargetRegion
from pageferry.errors import ImageError, RestoreError, UsageError
from pageferry.images import metadata
from pageferry.images.image import ImageFile
from pageferry.images.metadata import ImageIdentity
from pageferry.memory.bitmaps import unpack_units
from pageferry.memory.regions import LARGE_PAGE, Region


def large_units(image: ImageFile) -> list[list[bool]]:
    """Return, per region, whether each 2 MiB unit was backed by a huge page when the image was saved. Raises
    ImageError."""
    packed = image.section(metadata.LARGE_UNITS)
    result: list[list[bool]] = []
    at = 0
    for region in image.metadata.regions:
        count = -(-region.length // LARGE_PAGE)
        part = bytes(-(-count // 8)) if packed is None else packed[at : at + -(-count // 8)]
        at += len(part)
        try:
            result.append(unpack_units(part, count))
        except ValueError as wrong:
            raise ImageError(
                f"{image.path} is damaged: its bitmap of huge pages is too short; take another checkpoint"
            ) from wrong
    return result


def compare(image: ImageFile, regions: Sequence[Region]) -> None:
    """Raise RestoreError if the regions differ from those that were saved."""
    ours = [(region.name, region.length) for region in regions]
    saved = extents(image)
    if ours != saved:
        raise RestoreError(
            f"cannot restore {image.path}: it has {_describe(saved)}, the guest has {_describe(ours)}; use the "
            "options of the guest that was saved"
        )


def targets(image: ImageFile, regions: Sequence[Region]) -> list[TargetRegion]:
    """Return the targets of all regions. Raises RestoreError if the regions differ from those that were saved."""
    compare(image, regions)
    return [
        TargetRegion(Mapping(region.fd, region.length, region.file_offset), region.page_size, units)
        for region, units in zip(regions, large_units(image), strict=True)
    ]


def extents(image: ImageFile) -> list[tuple[str, int]]:
    """Return name and length of every region of an image."""
    return [(region.name, region.length) for region in image.metadata.regions]


def open_expected(path: str | Path, identity: ImageIdentity, name: str) -> ImageFile:
    """Open the image from which the memory of workload `name` is being restored.

    Raises RestoreError if another image is at `path`, ImageError if the image cannot be used.
    """
    image = ImageFile(path)
    check_identity(image, identity, name)
    return image


def check_identity(image: ImageFile, identity: ImageIdentity, name: str) -> None:
    """Raise RestoreError unless the image is the one that the restore of workload `name` began with."""
    if image.identity != identity:
        raise RestoreError(
            f"cannot restore the memory of {name} from {image.path}: its id is {image.identity.id}, and the "
            f"restore was started with id {identity.id}; use that image, or a copy of it"
        )


def check_firecracker(image: ImageFile) -> None:
    """Raise UsageError unless an image was imported from a snapshot of Firecracker."""
    found = image.metadata
    if found.kind != metadata.FIRECRACKER or len(found.regions) != 1:
        raise UsageError(
            f"cannot use {image.path}: it is an image of {found.name}, a workload of kind {found.kind}; use an image "
            "written by `pageferry image import --firecracker`"
        )


def check_cloud_hypervisor(image: ImageFile) -> None:
    """Raise UsageError unless an image is that of a VM of Cloud Hypervisor."""
    found = image.metadata
    if found.kind != metadata.CLOUD_HYPERVISOR:
        raise UsageError(
            f"cannot use {image.path}: it is an image of {found.name}, a workload of kind {found.kind}; use an image "
            "written by `pageferry checkpoint --cloud-hypervisor`"
        )


def _describe(regions: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} of {length >> 20} MiB" for name, length in regions)
