"""Request for one checkpoint, checked when it is created."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from pageferry.checkpoints.options import Options
from pageferry.errors import UsageError
from pageferry.events import Listener, ignore
from pageferry.images.image import ImageFile, beside
from pageferry.workloads.protocols import Saveable


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Request to save a workload to an image. Raises UsageError if the image cannot be written as requested."""

    workload: Saveable
    path: Path
    """Path of the image. The constructor makes it absolute."""
    options: Options
    listener: Listener = ignore
    parent: ImageFile | None = None
    """Earlier image of the workload: only pages that differ from it are stored."""
    id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    """Identifier of the image."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", self.path.absolute())
        if self.parent is not None:
            self._check_parent(self.parent)
        if self.path.is_dir():
            raise UsageError(f"cannot write {self.path}: it is a directory; give the name of a file")

    def _check_parent(self, parent: ImageFile) -> None:
        ours = [(region.name, region.length) for region in self.workload.regions]
        theirs = [(region.name, region.length) for region in parent.metadata.regions]
        if ours != theirs:
            raise UsageError(
                f"cannot use {parent.path} as the parent: it has regions {theirs}, {self.workload.name} has {ours}"
            )
        needed = beside(self.path, parent.path)
        if not (needed.exists() and needed.samefile(parent.path)):
            raise UsageError(
                f"cannot write {self.path}: its parent {parent.path} must be in the same directory; write to "
                f"{parent.path.parent}, or put a symbolic link to the parent into {self.path.parent}"
            )
        if self.path.exists() and any(self.path.samefile(link.path) for link in parent.links):
            raise UsageError(
                f"cannot write {self.path}: it would replace an image in the chain of its parents; use another name"
            )
