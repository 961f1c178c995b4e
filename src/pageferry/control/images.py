"""Inspection, verification, comparison and merging of images, and their conversion from and to snapshot files.

An image to read can be given by the URL of an image in a store (docs/stores.md). It is read through the cache of this
host: only what the operation needs is downloaded. The options `key`, `key_command` and `allow_plain` open an encrypted
image in a store (`pageferry.stores.options.OpenOptions`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Unpack, get_args

from pageferry import values
from pageferry._engine import WrittenImage
from pageferry.checkpoints.image_source import NO_KEY, keys_for, local_image
from pageferry.errors import ImageError, UsageError, WorkloadError
from pageferry.host.blocking import interruptible
from pageferry.images.events import (
    Difference,
    DiskSummary,
    ExportedSnapshot,
    Flattened,
    ImageSummary,
    ImportedSnapshot,
    LayerSummary,
    RegionSummary,
    Verification,
)
from pageferry.images.image import ImageFile
from pageferry.images.metadata import Codec
from pageferry.memory.regions import SMALL_PAGE
from pageferry.stores.address import is_url
from pageferry.stores.lazy_image import open_image_file
from pageferry.stores.options import OpenArguments, OpenOptions
from pageferry.workloads.qemu import block_devices, frozen_files
from pageferry.workloads.qemu.block_devices import BlockDevice, Layer
from pageferry.workloads.qemu.device_state import SavedState

_CLASSES = {
    "absent": "absent",
    "zero": "zero",
    "pattern": "pattern",
    "same-as": "same_as",
    "data": "data",
    "parent": "in_parent",
}
"""Classes of pages, and the fields of the engine with their numbers."""


def image_info(path: str | Path, **options: Unpack[OpenArguments]) -> ImageSummary:
    """Return the metadata of an image, and its number of pages by class. `options`: key, key_command and allow_plain
    for an image in a store. Raises ImageError, WrongKey.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> memoryview(arena)[0] = 7
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> info = pageferry.image_info("table.img")
        >>> print(info.kind, info.codec, info.regions[0].length, info.regions[0].pages["data"])
        arena lz4 1048576 1
    """
    with local_image("path", path, values.options(OpenOptions, options)) as local:
        return _info(interruptible(lambda: ImageFile(local)), str(path))


def verify_image(path: str | Path, **options: Unpack[OpenArguments]) -> Verification:
    """Read and verify every byte of an image and its parents. The result contains the damage that was found.
    `options`: key, key_command and allow_plain for an image in a store.

    Raises ImageError if the image cannot be opened, WrongKey.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> memoryview(arena)[0] = 7
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> found = pageferry.verify_image("table.img")
        >>> print(found.intact, found.findings)
        True []
    """
    found = _opened("path", path, values.options(OpenOptions, options))
    findings = interruptible(found.verify)
    return Verification(str(path), not findings, findings)


def compare_images(path: str | Path, other: str | Path, **options: Unpack[OpenArguments]) -> Difference:
    """Compare the contents of two images. `options`: key, key_command and allow_plain for images in stores.

    Raises ImageError, WrongKey.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> memoryview(arena)[0] = 7
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> memoryview(arena)[5000] = 8
        >>> result = pageferry.checkpoint(arena, "later.img")
        >>> pageferry.compare_images("table.img", "later.img").runs  # region, offset and length
        [('arena', 4096, 4096)]
    """
    keys = values.options(OpenOptions, options)
    first_keys, second_keys = keys_for(keys, path, other)
    one, second = _opened("path", path, first_keys), _opened("other", other, second_keys)
    runs = interruptible(lambda: one.differences(second))
    state_differs = one.state() != second.state()
    same = not runs and not state_differs
    named = [_named(one, start, end) for start, end in runs]
    return Difference(same, sum(end - start for start, end in runs), named, state_differs)


def flatten_image(
    path: str | Path, target: str | Path, *, codec: Codec | None = None, **options: Unpack[OpenArguments]
) -> Flattened:
    """Merge an incremental image and its parents into one image, which needs no parent. `codec`: compression of the new
    image, `none`, `lz4` or `zstd`; None for that of the image. `target` can be the URL of an image in a store.
    `options`: key, key_command and allow_plain for images in stores: the key opens the image, and encrypts the new one.

    Raises ImageError if an image is damaged, or if the new one cannot be written. Raises UsageError if `target` is the
    image or one of its parents. Raises StoreError, CheckpointError if the spool of an upload is full.

    Examples:
        >>> import pageferry
        >>> arena = pageferry.Arena("1MiB")
        >>> memoryview(arena)[0] = 7
        >>> result = pageferry.checkpoint(arena, "table.img")
        >>> result = pageferry.checkpoint(arena, "child.img", parent="table.img")
        >>> result = pageferry.flatten_image("child.img", "whole.img")
        >>> pageferry.image_info("whole.img").parents
        []
    """
    from pageferry.checkpoints.target import target as image_target  # the other functions write nothing
    from pageferry.checkpoints.target import write_image

    keys = values.options(OpenOptions, options)
    image_keys = keys if is_url(path) else NO_KEY
    if keys.allow_plain and not is_url(path):
        raise UsageError(f"`allow_plain` has no effect for the image file {path}; remove it")
    place = image_target("target", target, keys if is_url(target) or not is_url(path) else NO_KEY)
    if codec is not None:
        values.choice("codec", codec, get_args(Codec))
    image = _opened("path", path, image_keys)
    image.check_target(place.path)
    if place.uploads and keys.key is None and keys.key_command is None:
        from pageferry.stores.sources import check_uploadable

        check_uploadable(image)

    def write() -> WrittenImage:
        return write_image(place, lambda file: image.flatten(file, codec))

    try:
        written = write() if place.uploads else interruptible(write)  # an upload responds to Ctrl-C itself
        return Flattened(str(target), written.length)
    except OSError as error:
        raise ImageError(f"cannot write {target}: {error.strerror}") from error


def import_image(
    target: str | Path,
    *,
    firecracker: str | Path,
    vmstate: str | Path,
    parent: str | Path | None = None,
    full: bool = False,
    codec: Codec = "lz4",
) -> ImportedSnapshot:
    """Write the image of a snapshot of Firecracker. The image appears at `target` when it is complete and synced.

    `firecracker`: memory file of the snapshot; `vmstate`: its state file. `parent`: image of the snapshot on which this
    one is based, in the directory of `target`. Only pages that differ from it are stored, and holes of the memory file
    are its pages, as in a diff snapshot. `full`: with a parent, the snapshot is a full one: its holes are zeros.
    `codec`: compression, `none`, `lz4` or `zstd`.

    Raises UsageError if a file or the parent cannot be used, CheckpointError if the image cannot be written, ImageError
    if the parent is damaged.

    Examples:
        >>> import pageferry
        >>> from pathlib import Path
        >>> Path("memory").write_bytes(b"m" * 8192)  # stands for the files of a snapshot
        8192
        >>> Path("state").write_bytes(b"state")
        5
        >>> pageferry.import_image("image", firecracker="memory", vmstate="state").memory
        8192
    """
    from pageferry.checkpoints.snapshot_files import SnapshotFiles, import_snapshot  # the other functions write nothing

    path = values.path("target", target)
    source = SnapshotFiles(memory=values.path("firecracker", firecracker), state=values.path("vmstate", vmstate))
    values.choice("codec", codec, get_args(Codec))
    if values.flag("full", full) and parent is None:
        raise UsageError("`full` has no effect without `parent`; remove it")
    older = _opened("parent", parent) if parent is not None else None
    written = interruptible(lambda: import_snapshot(source, path, parent=older, full=full, codec=codec))
    image = _opened("target", path)
    return ImportedSnapshot(
        path=str(target),
        length=written.length,
        memory=image.pages * SMALL_PAGE,
        stored=image.chain.stored,
        parent=str(older.path) if older is not None else None,
    )


def export_image(
    path: str | Path, *, firecracker: str | Path, vmstate: str | Path, **options: Unpack[OpenArguments]
) -> ExportedSnapshot:
    """Write the memory file (`firecracker`) and the state file (`vmstate`) of a snapshot of Firecracker from an image
    that `import_image` has written, with the same bytes. The memory file is that of a full snapshot, and sparse.
    `options`: key, key_command and allow_plain for an image in a store.

    Existing files are replaced. Raises UsageError if the image is not that of a snapshot, ImageError if it is damaged
    or if a file cannot be written.

    Examples:
        >>> import pageferry
        >>> from pathlib import Path
        >>> Path("memory").write_bytes(b"m" * 8192)  # stands for the files of a snapshot
        8192
        >>> Path("state").write_bytes(b"state")
        5
        >>> imported = pageferry.import_image("image", firecracker="memory", vmstate="state")
        >>> exported = pageferry.export_image("image", firecracker="memory-2", vmstate="state-2")
        >>> Path("memory-2").read_bytes() == Path("memory").read_bytes()
        True
    """
    from pageferry.checkpoints.snapshot_files import SnapshotFiles, export_snapshot

    target = SnapshotFiles(memory=values.path("firecracker", firecracker), state=values.path("vmstate", vmstate))
    image = _opened("path", path, values.options(OpenOptions, options))
    interruptible(lambda: export_snapshot(image, target))
    return ExportedSnapshot(
        path=str(path), memory=str(firecracker), vmstate=str(vmstate), length=image.pages * SMALL_PAGE
    )


def _opened(parameter: str, path: str | Path, keys: OpenOptions = NO_KEY) -> ImageFile:
    """Open an image file, or an image in a store, through the cache of this host, with all of its storage blocks."""
    with local_image(parameter, path, keys) as local:
        return interruptible(lambda: open_image_file(local, whole=True))


def _info(file: ImageFile, name: str) -> ImageSummary:
    image, about = file.image, file.metadata
    regions, first = [], 0
    for region in about.regions:
        pages = region.length // SMALL_PAGE
        counted = image.count(first, pages)
        counts = {name: getattr(counted, field) for name, field in _CLASSES.items()}
        regions.append(RegionSummary(region.name, region.length, counts))
        first += pages
    return ImageSummary(
        path=name,
        id=image.id.hex(),
        digest=f"{image.digest:016x}",
        kind=about.kind,
        name=about.name,
        restorable=about.restorable,
        paused=about.kind == "qemu" and not SavedState.decode(file.state()).was_running,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(about.created)),
        codec=about.codec,
        length=image.length,
        blocks=image.block_count,
        page_block=image.page_block,
        state=len(file.state()),
        regions=regions,
        parents=[str(link.path) for link in file.links[1:]],
        disks=_disks(file),
    )


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
            saved=[_layer(layer) for layer in disk.saved],
            frozen=disk.frozen,
            needed_by=_needs(disk),
        )
        for disk in record.devices
    ]


def _needs(disk: BlockDevice) -> list[str]:
    """Return the images and overlays that need the saved contents of a disk, the image itself included."""
    try:
        record = frozen_files.find(disk.saved[0].path) if disk.saved else None
    except WorkloadError as wrong:
        return [str(wrong)]
    return [str(need) for need in record.existing] if record is not None else []


def _layer(layer: Layer) -> LayerSummary:
    generation = layer.generation
    modified = block_devices.time_text(generation.modified) if generation is not None else None
    return LayerSummary(path=layer.path, format=layer.format, driver=layer.driver, modified=modified)


def _named(file: ImageFile, start: int, end: int) -> tuple[str, int, int]:
    first = 0
    for region in file.metadata.regions:
        pages = region.length // SMALL_PAGE
        if start < first + pages:
            return region.name, (start - first) * SMALL_PAGE, (end - start) * SMALL_PAGE
        first += pages
    raise ImageError(f"{file.path} is damaged: page {start} is outside all regions; take another checkpoint")
