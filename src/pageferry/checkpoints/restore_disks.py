"""Disks of a restored guest: overlays over the disks that were saved with the image, or the disks of the command line.

The image is opened before QEMU starts, and only if the command line may attach disks. This takes about a millisecond,
during which the pager process starts in any case.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from pageferry.errors import UsageError
from pageferry.images.image import open_link
from pageferry.values import Placed
from pageferry.workloads.qemu import block_devices, disk_arguments
from pageferry.workloads.qemu.block_devices import DiskRecord
from pageferry.workloads.qemu.disk_overlays import GuestOverlays


class GuestDisks:
    """Disks of the guest `name`, which is restored from `image`. `chosen`: value of the option `disks`; None for the
    default."""

    def __init__(self, name: str, image: Path, chosen: Placed | None) -> None:
        self._name = name
        self._image = image
        self._chosen = chosen
        self._overlays: GuestOverlays | None = None
        self._mutex = threading.Lock()
        """Lock that is held while overlays are created: `prepare` continues in its thread after a cancellation."""
        self._discarded = False

    @property
    def as_is(self) -> bool:
        """Whether the contents of the disks are not compared."""
        return self._chosen is not None and self._chosen.word == "as-is"

    @property
    def overlays(self) -> dict[str, str]:
        """Path of each new overlay, by the id of the disk."""
        return {id: str(path) for id, path in self._overlays.paths.items()} if self._overlays is not None else {}

    def prepare(self, arguments: Sequence[str]) -> Sequence[str]:
        """Create the overlays, if the guest gets any, and return the command line of QEMU. Raises ImageError and the
        errors of `GuestOverlays`."""
        wanted = self._chosen is not None and self._chosen.word == "overlay"
        if not wanted and (self._chosen is not None or not disk_arguments.has_disks(arguments)):
            return arguments
        record = block_devices.decode(open_link(self._image).metadata.details)
        if record is not None and record.saved:
            return self._create(arguments, record)
        if wanted:
            raise UsageError(
                f"`disks` overlay requires an image with disks, and {self._image} has none; save the guest with "
                "`pageferry checkpoint --disks snapshot` or copy"
            )
        return arguments

    def discard(self) -> None:
        """Remove the overlays after a failed restore. QEMU must have exited. A `prepare` that is still in progress
        leaves no overlays."""
        with self._mutex:
            self._discarded = True
            overlays, self._overlays = self._overlays, None
        if overlays is not None:
            overlays.discard()

    def _create(self, arguments: Sequence[str], record: DiskRecord) -> Sequence[str]:
        folder = self._chosen.folder if self._chosen is not None else None
        with self._mutex:
            if self._discarded:
                return arguments  # the caller has been cancelled, and does not start QEMU
            self._overlays = GuestOverlays(self._name, arguments, record, folder)
        return self._overlays.arguments
