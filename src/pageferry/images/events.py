"""Results of `pageferry image`."""

from __future__ import annotations

import msgspec

from pageferry.events import Event


class RegionSummary(msgspec.Struct, frozen=True, rename="kebab"):
    """Number of pages of a region by class."""

    name: str
    length: int
    pages: dict[str, int]


class LayerSummary(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Image in the backing chain of a disk."""

    path: str
    """Path, or URI of an export."""
    format: str
    driver: str
    """Block driver that accesses the file, such as `file` or `nbd`."""
    modified: str | None
    """Time of the last modification before the snapshot point, UTC, ISO 8601; None if it is not known."""


class DiskSummary(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Disk of a guest as of the snapshot point. Its contents are not part of the image file."""

    id: str
    name: str
    size: int
    """Size, bytes; 0 for a drive without a medium."""
    read_only: bool
    cache: str
    """Use of the host's page cache: `buffered` or `direct`, with `,no-flush` if flushes are ignored."""
    in_state: bool
    """Whether the device state contains the contents, as for a TPM."""
    layers: list[LayerSummary]
    """Backing chain, the image that is written to first; empty for a drive without a medium."""
    saved: list[LayerSummary] = msgspec.field(default_factory=list)
    """Backing chain with the contents as of the snapshot point; empty if they were not saved."""
    frozen: bool = False
    """Whether the disk itself was frozen; otherwise `saved` is a copy."""
    needed_by: list[str] = msgspec.field(default_factory=list)
    """Existing images and overlays that need the saved contents."""


class ImageSummary(Event, frozen=True, kw_only=True, tag="image"):
    """Result of `pageferry image info`."""

    path: str
    id: str
    digest: str
    kind: str
    name: str
    restorable: bool
    paused: bool
    """Whether the user had paused the guest when it was saved. A restored guest is then paused too."""
    created: str
    """Time of the snapshot point, UTC, ISO 8601."""
    codec: str
    length: int
    """Size of the file, bytes."""
    blocks: int
    page_block: int
    state: int
    """Size of the device state, bytes."""
    regions: list[RegionSummary]
    parents: list[str]
    disks: list[DiskSummary] | None
    """Disks of the guest; None if the image does not describe any."""


class Verification(Event, frozen=True, tag="image-verify"):
    """Result of `pageferry image verify`."""

    path: str
    intact: bool
    findings: list[str]


class Difference(Event, frozen=True, tag="image-diff"):
    """Result of `pageferry image diff`."""

    same: bool
    pages: int
    """Number of pages that differ."""
    runs: list[tuple[str, int, int]]
    """Runs of pages that differ, each as (region, first byte, length in bytes)."""
    state_differs: bool


class ImportedSnapshot(Event, frozen=True, kw_only=True, tag="image-import"):
    """Result of `pageferry image import`."""

    path: str
    """Path of the image."""
    length: int
    """Size of the image, bytes."""
    memory: int
    """Size of the memory of the snapshot, bytes."""
    stored: int
    """Pages that the image contains itself; the others are zeros, patterns or pages of the parent."""
    parent: str | None
    """Path of the parent; None for an image that needs no other image."""


class ExportedSnapshot(Event, frozen=True, kw_only=True, tag="image-export"):
    """Result of `pageferry image export`."""

    path: str
    """Path of the image."""
    memory: str
    """Path of the memory file."""
    vmstate: str
    """Path of the state file."""
    length: int
    """Size of the memory file, bytes, with its holes."""


class Flattened(Event, frozen=True, tag="image-flatten"):
    """Result of `pageferry image flatten`."""

    path: str
    length: int
