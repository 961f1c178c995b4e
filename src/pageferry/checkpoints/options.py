"""What can be chosen about a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pageferry.checkpoints.metadata import Codec
from pageferry.errors import UsageError

Mode = Literal["lazy", "stop"]

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a checkpoint, as `pageferry checkpoint` has them. Raises UsageError for values out of range."""

    mode: Mode = "lazy"
    """Save while the workload runs (S4), or with the workload paused from beginning to end."""
    codec: Codec = "lz4"
    """Compression of page blocks."""
    bandwidth: int = 0
    """Bytes per second that the background sweep saves; 0: as fast as it can. Traps are not limited."""
    trap_block: int = 64 * KIB
    """What a write to unsaved memory copies and releases; a power of two."""
    page_block: int = 64 * KIB
    """What is compressed as one, and read as one from a storage block."""
    storage_block: int = 1 * MIB
    """What is read from the image as one."""
    staging: int = 16 * MIB
    """Copies of unsaved pages that wait to be compressed; half of it is for traps alone."""
    packers: int = 1
    """Threads that compress."""

    track: bool | None = None
    """Leave a write trace, so that the next checkpoint with this one as its parent reads only what was written; None:
    where this one has a parent itself. Lazy mode only."""
    at_instant: int = 16 * MIB
    """What may be copied in the pause where a trace says what was written; before it, there are rounds."""

    def __post_init__(self) -> None:
        _check("bandwidth", self.bandwidth, 0, 1 << 50, "bytes per second")
        _check("trap-block", self.trap_block, 4 * KIB, 2 * MIB, "bytes")
        _check("page-block", self.page_block, 4 * KIB, 1 * MIB, "bytes")
        _check("storage-block", self.storage_block, self.page_block, 4 * MIB, "bytes")
        _check("staging", self.staging, 2 * self.trap_block, 1 << 40, "bytes")
        _check("at-instant", self.at_instant, 0, 1 << 40, "bytes")
        _check("packers", self.packers, 1, 64, "threads")
        if self.trap_block & (self.trap_block - 1):
            raise UsageError(f"trap-block of {self.trap_block} bytes: a power of two")
        if self.track and self.mode != "lazy":
            raise UsageError("a trace can be left by mode lazy only")
        if self.page_block % (4 * KIB) or self.storage_block % self.page_block:
            raise UsageError("page blocks are made of 4 KiB pages, storage blocks of page blocks")


def _check(name: str, value: int, least: int, most: int, unit: str) -> None:
    if not least <= value <= most:
        raise UsageError(f"{name} of {value}: give {least} to {most} {unit}")
