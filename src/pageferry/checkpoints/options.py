"""Options of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pageferry import values
from pageferry.errors import UsageError
from pageferry.images.metadata import Codec

Mode = Literal["lazy", "stop"]

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a checkpoint, as those of `pageferry checkpoint`.

    Sizes and rates are numbers in the unit of the field, or strings such as `64K`. Raises UsageError.
    """

    mode: Mode = "lazy"
    """`lazy`: save while the workload runs (S4). `stop`: pause the workload for the whole checkpoint."""
    codec: Codec = "lz4"
    """Compression of page blocks."""
    bandwidth: int = 0
    """Limit for the background sweep, bytes of memory per second; 0 for none. Traps are not limited."""
    trap_block: int = 64 * KIB
    """Unit that a write to unsaved memory copies and unprotects, bytes; a power of two."""
    page_block: int = 64 * KIB
    """Unit of compression, bytes."""
    storage_block: int = 1 * MIB
    """Unit of reads from the image, bytes."""
    staging: int = 16 * MIB
    """Size of the buffer for copies of unsaved pages that wait for compression, bytes; half of it is reserved for
    traps."""
    packers: int = 1
    """Number of threads that compress."""

    track: bool | None = None
    """Leave a write trace, so that the next checkpoint with this one as its parent reads only written pages. None to do
    so if this checkpoint has a parent. Lazy mode only."""
    at_instant: int = 16 * MIB
    """Maximum number of bytes copied in the pause if a write trace reports the written pages; until they fit, pages are
    saved in rounds before it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidth", values.rate("bandwidth", self.bandwidth))
        self._check_size("trap_block", 4 * KIB, 2 * MIB)
        self._check_size("page_block", 4 * KIB, 1 * MIB)
        self._check_size("storage_block", self.page_block, 4 * MIB)
        self._check_size("staging", 2 * self.trap_block, 1 << 40)
        self._check_size("at_instant", 0, 1 << 40)
        object.__setattr__(self, "packers", values.count("packers", self.packers, 1, 64))
        values.choice("mode", self.mode, get_args(Mode))
        values.choice("codec", self.codec, get_args(Codec))
        values.optional(values.flag, "track", self.track)
        if self.trap_block & (self.trap_block - 1):
            raise UsageError(f"invalid `trap_block` {self.trap_block}: expected a power of two")
        if self.track and self.mode != "lazy":
            raise UsageError("`track` requires `mode` lazy: other modes leave no write trace")
        if self.page_block % (4 * KIB) or self.storage_block % self.page_block:
            raise UsageError(
                "invalid sizes: expected `page_block` as a multiple of 4 KiB, and `storage_block` as a multiple of "
                "`page_block`"
            )

    def _check_size(self, name: str, least: int, most: int) -> None:
        object.__setattr__(self, name, values.size(name, getattr(self, name), least, most))
