"""Request for one checkpoint, checked when it is created."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pageferry.checkpoints.options import Options
from pageferry.checkpoints.target import Target
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.images.image import ImageFile
from pageferry.memory.view import Extent
from pageferry.workloads.protocols import Saveable, SavesDisks

if TYPE_CHECKING:
    from pageferry.pager.base_records import CloneRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Request to save a workload to an image. Raises UsageError if the image cannot be written as requested."""

    workload: Saveable
    target: Target
    """File or image in a store to write."""
    options: Options
    listener: Listener = ignore
    parent: ImageFile | None = None
    """Earlier image of the workload: only pages that differ from it are stored."""
    clone: CloneRecord | None = None
    """Record of a clone, whose parent is the image that it shares; None for any other workload."""
    id: bytes = field(default_factory=lambda: os.urandom(16))
    """Identifier of the image."""

    def __post_init__(self) -> None:
        if self.parent is not None:
            self._check_parent(self.parent)
        if self.options.disks.word != "record" and not isinstance(self.workload, SavesDisks):
            raise UsageError(
                f"`disks` {self.options.disks.word} requires a QEMU guest, and {self.workload.name} has no disks; "
                "use `disks` record"
            )
        self.target.check(self.options, self.parent)

    def _check_parent(self, parent: ImageFile) -> None:
        regions: Sequence[Extent] = self.workload.regions if self.clone is None else self.clone.regions
        ours = [(region.name, region.length) for region in regions]
        theirs = [(region.name, region.length) for region in parent.metadata.regions]
        if ours != theirs:
            raise UsageError(
                f"cannot use {parent.path} as the parent: its regions are {theirs}, and those of {self.workload.name} "
                f"are {ours}; use an image of the same guest, or none"
            )
