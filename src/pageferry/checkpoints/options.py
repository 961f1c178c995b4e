"""Options of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pageferry import values
from pageferry.errors import UsageError
from pageferry.images.metadata import Codec
from pageferry.options import API_ONLY, Count, Place, Rate, Size
from pageferry.stores.options import OpenArguments, OpenOptions
from pageferry.values import Placed

Mode = Literal["lazy", "stop"]
Memory = Literal["own", "shared"]
Clones = Annotated[int, Count(least=1, most=4096)]
"""Number of guests to start from one image."""
RECORDED = Placed("record")
SAVED_DISKS = Place(forms=("record", "snapshot[:DIR]", "copy:DIR"))
RESTORED_DISKS = Place(
    forms=("checked", "as-is", "overlay[:DIR]"),
    unset="overlay if the disks were saved with the image, otherwise checked",
)


KIB, MIB = 1 << 10, 1 << 20


def check_loading(eager: bool, prefetch: bool) -> None:
    """Raise UsageError if a restore would load in the background eagerly, and not at all."""
    if eager and not prefetch:
        raise UsageError(
            "`eager` requires background loading, which --no-prefetch (in Python prefetch=False) disables; remove one "
            "of them"
        )


class CheckpointArguments(OpenArguments, total=False):
    """Keyword arguments of `checkpoint` for the fields of `Options`."""

    track: bool | None
    mode: Mode
    disks: Placed | str
    codec: Codec
    bandwidth: int | str
    trap_block: int | str
    page_block: int | str
    storage_block: int | str
    staging: int | str
    packers: int
    at_snapshot_point: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(OpenOptions):
    """Options of a checkpoint: those of `pageferry checkpoint`, and also `packers` and `at_snapshot_point`. With a key,
    an image in a store is encrypted; the same key opens a parent in a store.

    Sizes are in bytes and rates in bytes per second, or strings such as `64K`. Raises UsageError.
    """

    track: bool | None = None
    """Leave a write trace installed, so that a later checkpoint with this image as its parent reads only written pages;
    until then the first write to each page costs a minor fault, and huge pages are mapped as base pages (default: only
    with a parent)."""
    mode: Mode = "lazy"
    """Save memory while the workload runs (S4), or keep it paused until the checkpoint ends."""
    disks: Annotated[Placed, SAVED_DISKS] = RECORDED
    """Record which disks a guest has (record). In addition, freeze them and have the guest write to overlays (snapshot
    or snapshot:DIR), or copy them (copy:DIR); see docs/disks.md."""
    codec: Codec = "lz4"
    """Compression of page blocks."""
    bandwidth: Annotated[int, Rate()] = 0
    """Limit for saving pages while the workload runs, and then for copying its disks, in bytes per second; copies for
    which a write of the workload waits are not limited, and nothing is limited while the workload is paused."""
    trap_block: Annotated[int, Size(4 * KIB, 2 * MIB), "sizes"] = 64 * KIB
    """Block that is copied when the workload first writes to it; a power of two."""
    page_block: Annotated[int, Size(4 * KIB, 1 * MIB), "sizes"] = 64 * KIB
    """Unit of compression."""
    storage_block: Annotated[int, Size(4 * KIB, 4 * MIB), "sizes"] = 1 * MIB
    """Unit of reads from the image."""
    staging: Annotated[int, Size(8 * KIB, 1 << 40), "sizes"] = 16 * MIB
    """Memory for copies that are not compressed yet; half of it is reserved for writes of the workload."""
    packers: Annotated[int, Count(1, 64), API_ONLY] = 1
    """Number of threads that compress pages."""
    at_snapshot_point: Annotated[int, Size(0, 1 << 40), API_ONLY] = 16 * MIB
    """Maximum number of bytes copied in the pause if a write trace reports the written pages; until the remaining pages
    fit, pages are saved in rounds before the pause."""

    def __post_init__(self) -> None:
        OpenOptions.__post_init__(self)
        values.size("storage_block", self.storage_block, self.page_block, 4 * MIB)
        values.size("staging", self.staging, 2 * self.trap_block, 1 << 40)
        if self.trap_block & (self.trap_block - 1):
            raise UsageError(f"invalid `trap_block` {self.trap_block}: expected a power of two")
        if self.track and self.mode != "lazy":
            raise UsageError(
                "`track` requires `mode` lazy: other modes leave no write trace; remove `track`, or use lazy"
            )
        if self.page_block % (4 * KIB) or self.storage_block % self.page_block:
            raise UsageError(
                "invalid sizes: expected `page_block` as a multiple of 4 KiB, and `storage_block` as a multiple of "
                "`page_block`"
            )
