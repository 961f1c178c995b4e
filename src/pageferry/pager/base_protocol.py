"""State of a base and its clones, as its pager reports it (see `base_service`)."""

from __future__ import annotations

import msgspec


class CloneStatus(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """State of one clone."""

    name: str
    pid: int
    faults: int
    """Number of faults that the pager has resolved."""
    missed: int
    """Number of faults for which a unit of 2 MiB was loaded from the image."""
    zeros: int
    """Number of faults on units that contain only zeros."""


class BaseStatus(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """State of a base."""

    image: str
    pager: int
    """Process id of the pager."""
    length: int
    """Size of the memory of one clone, bytes."""
    resident: int
    """Memory that the base occupies, bytes."""
    deferred: int
    """Memory that is not loaded yet, bytes."""
    prefetched: int
    """Memory loaded in the background, bytes."""
    bytes_read: int
    """Number of bytes of storage blocks read."""
    failures: list[str]
    """Units that cannot be read, with the cause."""
    clones: list[CloneStatus]
